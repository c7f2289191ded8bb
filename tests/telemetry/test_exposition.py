from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from tests.telemetry.samples import samples
from trio_router.telemetry.exposition import MAX_SERIES, Scraped, merge

SAID = """\
# HELP llamacpp:prompt_tokens_total Number of prompt tokens processed.
# TYPE llamacpp:prompt_tokens_total counter
llamacpp:prompt_tokens_total {}
# HELP llamacpp:requests_processing Number of requests processing.
# TYPE llamacpp:requests_processing gauge
llamacpp:requests_processing 0
"""


def test_each_family_once_each_series_with_its_model() -> None:
    merged = merge([Scraped(alias="qwen", text=SAID.format(54)), Scraped(alias="a/b", text=SAID.format("1.5e3"))])
    assert merged == (
        "# HELP llamacpp:prompt_tokens_total Number of prompt tokens processed.\n"
        "# TYPE llamacpp:prompt_tokens_total counter\n"
        'llamacpp:prompt_tokens_total{model="qwen"} 54\n'
        'llamacpp:prompt_tokens_total{model="a/b"} 1.5e3\n'
        "# HELP llamacpp:requests_processing Number of requests processing.\n"
        "# TYPE llamacpp:requests_processing gauge\n"
        'llamacpp:requests_processing{model="qwen"} 0\n'
        'llamacpp:requests_processing{model="a/b"} 0\n'
    )


def test_one_that_does_not_answer_is_a_comment() -> None:
    merged = merge([Scraped(alias="qwen", problem="no answer\nevil 1"), Scraped(alias="llama", text=SAID.format(1))])
    assert merged.startswith("# model qwen: no answer evil 1\n# HELP")
    assert {series[1] for series in samples(merged)} == {"model=llama"}


def test_nothing_runs() -> None:
    assert merge([]) == "\n"
    assert list(text_string_to_metric_families(merge([]))) == []


def test_labels_that_were_there() -> None:
    merged = merge([Scraped(alias='q"\\', text='x{model="m",a="b\\",c=\\"",} 1 1700000000\nx{} NaN')])
    assert merged == 'x{model="q\\"\\\\",exported_model="m",a="b\\",c=\\""} 1\nx{model="q\\"\\\\"} NaN\n'


def test_a_histogram_stays_together() -> None:
    text = '# TYPE h histogram\nh_bucket{le="1"} 1\nh_bucket{le="+Inf"} 2\nh_sum 3\nh_count 2\nother_count 1\n'
    merged = merge([Scraped(alias="a", text=text), Scraped(alias="b", text=text)])
    found = {family.name: family.type for family in text_string_to_metric_families(merged)}
    assert found["h"] == "histogram"
    assert merged.index('other_count{model="a"}') > merged.index('h_count{model="b"}')


def test_lines_that_are_no_samples_are_left_out() -> None:
    text = "x one\nx{ 1\n{} 1\n1x 1\nx 1 2 3\n<html>\nx -Inf\nx +1.\nx ..\n# HELP\n# EOF\n" + "y" * 5000 + " 1"
    assert merge([Scraped(alias="a", text=text)]) == 'x{model="a"} -Inf\nx{model="a"} +1.\n'


def test_a_flood_is_cut() -> None:
    text = "".join(f"x{number} 1\n" for number in range(5000))
    assert len(samples(merge([Scraped(alias="a", text=text)]))) == MAX_SERIES


@given(st.text(), st.text())
def test_any_text(first: str, second: str) -> None:
    merged = merge([Scraped(alias="a", text=first), Scraped(alias="b", text=second)])
    for line in merged.splitlines():
        assert not line or line.startswith("#") or 'model="' in line
