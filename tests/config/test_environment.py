import pytest

from trio_router.config.environment import read_variables


def read(folder, text=None, **environ):
    if text is not None:
        (folder / ".env").write_text(text)
    variables, problems = read_variables(folder, environ)
    return {name: variable.value for name, variable in variables.items()}, problems


def test_nothing_set(tmp_path):
    assert read(tmp_path) == ({}, [])


def test_only_our_names_are_read(tmp_path):
    text = "PATH=/evil\nAPI_KEYS=no\nmy API_KEY=no\nnonsense 'here\nAPI_KEY=yes\n"
    assert read(tmp_path, text, HOME="/x", API_PORT="1") == ({"API_KEY": "yes"}, [])


def test_the_real_environment_wins(tmp_path):
    values, _ = read(tmp_path, "API_KEY=file\nBASE_MODELS_PATH=file\n", API_KEY="real")
    assert values == {"API_KEY": "real", "BASE_MODELS_PATH": "file"}


def test_an_empty_variable_is_unset(tmp_path):
    values, _ = read(tmp_path, "API_KEY=file\nBASE_MODELS_PATH=\n", API_KEY="", BASE_MODELS_PATH="")
    assert values == {"API_KEY": "file"}


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("API_KEY=plain", "plain"),
        ("  API_KEY = spaced  ", "spaced"),
        ("export API_KEY=x", "x"),
        ("export\tAPI_KEY=x", "x"),
        ("API_KEY=x # comment", "x"),
        ("API_KEY=x#y", "x#y"),
        ("API_KEY=#y", "#y"),
        ("API_KEY=a=b", "a=b"),
        ("API_KEY='single # not' # c", "single # not"),
        (r"API_KEY='back\slash'", r"back\slash"),
        ('API_KEY="double"', "double"),
        (r'API_KEY="a\"b\\c" # c', r'a"b\c'),
        (r'API_KEY="a\nb"', "a\nb"),
        ('API_KEY="a #b"', "a #b"),
        ("API_KEY=mid'quote", "mid'quote"),
        ("API_KEY=first\nAPI_KEY=second", "second"),
        ("API_KEY=x\r", "x"),
        ("\ufeffAPI_KEY=x", "x"),
    ],
)
def test_dotenv_lines(tmp_path, line, value):
    assert read(tmp_path, line + "\n") == ({"API_KEY": value}, [])


@pytest.mark.parametrize(
    "line", ["# API_KEY=x", "API_KEY", "API_KEY=", "API_KEY=''", 'API_KEY=""', "API_KEY= # x", "api_key=x", ""]
)
def test_dotenv_lines_that_set_nothing(tmp_path, line):
    assert read(tmp_path, line + "\n") == ({}, [])


def test_an_empty_line_takes_back_an_earlier_one(tmp_path):
    assert read(tmp_path, "API_KEY=x\nAPI_KEY=\n") == ({}, [])


@pytest.mark.parametrize("value", ["'open", '"open', "'a' b", '"a"b'])
def test_broken_quotes_are_located_and_not_repeated(tmp_path, value):
    values, [problem] = read(tmp_path, f"\nAPI_KEY={value}\n")
    assert values == {}
    assert (problem.file, problem.line, problem.key) == (str(tmp_path / ".env"), 2, "API_KEY")
    assert value not in str(problem)


def test_broken_quotes_do_not_matter_when_the_real_environment_has_the_name(tmp_path):
    assert read(tmp_path, "API_KEY='open\n", API_KEY="x") == ({"API_KEY": "x"}, [])


def test_a_folder_named_dotenv_is_nobodys_problem(tmp_path):
    (tmp_path / ".env").mkdir()
    assert read(tmp_path) == ({}, [])


def test_bytes_that_are_no_text_pass_through(tmp_path):
    (tmp_path / ".env").write_bytes(b"OTHER=\xff\nBASE_MODELS_PATH=/m\xff\n")
    assert read(tmp_path) == ({"BASE_MODELS_PATH": "/m\udcff"}, [])


def test_a_secret_is_not_in_the_repr(tmp_path):
    variables, _ = read_variables(tmp_path, {"API_KEY": "hunter2"})
    assert "hunter2" not in repr(variables)
