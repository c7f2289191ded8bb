import pytest

from trio_router.config.problems import ConfigError, Problem, written_key


@pytest.mark.parametrize(
    ("path", "written"),
    [
        ((), ""),
        (("api",), "api"),
        (("models", "qwen", "flags", 1), "models.qwen.flags[1]"),
        (("models", "b.c", "flags"), 'models."b.c".flags'),
        (("models", "a/b"), 'models."a/b"'),
        (("models", ""), 'models.""'),
        (("models", 'x"\ny'), r'models."x\"\ny"'),
    ],
)
def test_a_key_is_written_as_in_toml(path, written):
    assert written_key(path) == written


@pytest.mark.parametrize(
    ("problem", "line"),
    [
        (
            Problem(file="router.toml", line=14, key="models.qwen.slots", message="expected int, got str '3'"),
            "router.toml: models.qwen.slots: expected int, got str '3' (line 14)",
        ),
        (Problem(file="router.toml", key="models.qwen.flags", message="no"), "router.toml: models.qwen.flags: no"),
        (Problem(file="router.toml", message="no such file"), "router.toml: no such file"),
        (Problem(file="environment", key="API_KEY", message="no"), "environment: API_KEY: no"),
    ],
)
def test_a_problem_is_one_line(problem, line):
    assert str(problem) == line


def test_the_error_holds_all_of_them():
    problems = [Problem(file="a", message="1"), Problem(file="a", message="2")]
    error = ConfigError(problems)
    assert error.problems == tuple(problems)
    assert str(error) == "a: 1\na: 2"
