"""The pages of results: what they name exists, and their commands are those of this version."""
import importlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from util import ROOT

import common

RESULTS = ROOT / "tests" / "results"
PAGES = [ROOT / "README.md", *sorted(RESULTS.glob("*.md"))]
SCRIPTS = ("cd", "ct", "ctm", "guided_distill")
TOOLS = ("bench", "gpu", "evaluate")
OLD = {"--times"}  # flags of before, named as such


def without_code(text):
    return re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)


def links(page):
    """What a page links to of this project: (file, anchor or "")."""
    targets = re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text()))
    here = [target.partition("#") for target in targets if "://" not in target]
    return [((page.parent / path).resolve() if path else page, anchor) for path, _, anchor in here]


def anchors(page):
    """The anchors that GitHub makes of a page's titles."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def commands(text):
    """The command lines of this project's scripts in a page or a docstring."""
    found = re.findall(r"`python ((?:tests/)?\w+\.py[^`]*)`", text)
    lines = re.findall(r"^(?:    )?(?:\w+=\w+,?\w* )?(?:python|torchrun \S+) "
                       r"((?:tests/)?\w+\.py.*)", text, re.MULTILINE)
    return found + [re.split(r" {3,}", line)[0] for line in lines]


def parse(monkeypatch, command):
    """Read a command line as its script does. Raises UserError or SystemExit."""
    words = shlex.split(command)
    name = words[0].removeprefix("tests/").removesuffix(".py")
    if name in SCRIPTS:
        module = importlib.import_module(name)
        monkeypatch.setattr(sys, "argv", words)
        common.parse_flags(module.make_parser(), module.recipe, module.check)
    elif name in TOOLS:
        importlib.import_module(name).make_parser().parse_args(words[1:])


def test_every_file_of_the_results_is_linked():
    """From their README, or from a page that it links to."""
    start = RESULTS / "README.md"
    linked = {file for file, _ in links(start)}
    for page in [file for file in linked if file.suffix == ".md"]:
        linked |= {file for file, _ in links(page)}
    lost = {file.name for file in RESULTS.iterdir()} - {file.name for file in linked | {start}}
    assert not lost


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    broken = [f"{file.name}#{anchor}" for file, anchor in links(page)
              if not file.exists() or anchor and anchor not in anchors(file)]
    assert not broken


def test_commits_exist():
    def git(*words):
        return subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True)

    if not shutil.which("git") or git("rev-parse", "--is-shallow-repository").stdout != "false\n":
        pytest.skip("not a clone with its history")
    text = without_code("\n".join(page.read_text() for page in PAGES[1:]))
    named = set(re.findall(r"\b(?=\d*[a-f])(?=[a-f]*\d)[0-9a-f]{7}\b", text))
    assert named
    unknown = [name for name in named if git("cat-file", "-e", f"{name}^{{commit}}").returncode]
    assert not unknown


@pytest.mark.parametrize("page", [*PAGES, *(ROOT / f"{name}.py" for name in SCRIPTS)],
                         ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_understood(monkeypatch, page):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    text = page.read_text()
    if page.suffix == ".py":
        text = text.split('"""')[1]
    refused = []
    for command in commands(text):
        try:
            parse(monkeypatch, command)
        except (common.UserError, SystemExit) as error:
            refused.append(f"{command}: {error}")
    assert not refused and commands(text)


def test_flags_exist():
    known = set(OLD)
    for name in SCRIPTS + TOOLS:
        parser = importlib.import_module(name).make_parser()
        parsers = [parser]
        if name == "bench":
            parsers += parser._subparsers._group_actions[0].choices.values()
        for each in parsers:
            known |= set(each._option_string_actions)
    for page in PAGES[1:]:
        spans = re.findall(r"`(--[^`]*)`", page.read_text())
        flags = {word for span in spans for word in re.findall(r"(?<!\S)--[a-zA-Z][\w-]*", span)}
        assert flags <= known, (page.name, flags - known)


@pytest.mark.parametrize("source", ["README.md", *(f"{name}.py" for name in SCRIPTS)])
def test_what_is_said_elsewhere_stands_in_the_results(source):
    """Shares and FIDs of README's table and of the scripts' docstrings."""
    text = (ROOT / source).read_text()
    if source == "README.md":
        rows = [line for line in text.splitlines() if line.startswith("|")]
        said = re.sub(r"\([^)]*\)", "", "\n".join(rows))  # no arXiv numbers
    else:
        said = re.split("Result: |Measured: ", text.split('"""')[1])[1]
    numbers = set(re.findall(r"\d+\.\d+", said))
    page = set(re.findall(r"\d+\.\d+", (RESULTS / "README.md").read_text()))
    assert numbers and numbers <= page, numbers - page
