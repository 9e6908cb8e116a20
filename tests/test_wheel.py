"""The wheel, installed in a clean environment, finds its prompts from another folder."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROMPTS = ["conversation", "item_tokens", "letters", "likelihood", "reason", "yes_no"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


def test_the_wheel_holds_the_package_and_its_prompts_and_no_more(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == {"llmrec"}
    prompts = [f"llmrec/prompts/{name}.md" for name in PROMPTS]
    assert sorted(n for n in names if n.startswith("llmrec/prompts/")) == prompts
    assert "llmrec/serve/openapi.json" in names
    page = {f"llmrec/serve/page/{file.name}" for file in (ROOT / "llmrec" / "serve" / "page").iterdir()}
    assert "llmrec/serve/page/index.html" in page and page <= set(names)
    assert "llmrec/py.typed" in names


def test_installed_elsewhere_every_prompt_loads(wheel, tmp_path):
    # Its dependencies come from this environment: no network. The package itself only from the wheel.
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*command, str(wheel)], check=True, capture_output=True)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import llmrec; from pathlib import Path; from llmrec.prompt import Prompt\n"
        "assert Path(llmrec.__file__).is_relative_to(sys.argv[1]), llmrec.__file__\n"
        "folder = Path(llmrec.__file__).parent / 'prompts'\n"
        "names = sorted(p.stem for p in folder.glob('*.md'))\n"
        f"assert names == {PROMPTS}, names\n"
        "print([Prompt.load(n).sha256 for n in names])\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(target)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
