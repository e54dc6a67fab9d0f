"""Nothing in the repository opens what can run code: by the source, so that a new file is held to it too."""

import ast

import pytest

from tests.conftest import ROOT

FOLDERS = ("jaxllm", "experiments", "configs", "benchmarks", "scripts")
FILES = [p for folder in FOLDERS for p in sorted((ROOT / folder).rglob("*.py"))]
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "tarfile"}
CALLS = {"eval", "extractall", "unpack_archive", "parse_expr"}
EXECUTES = {"jaxllm/generate/sandbox/child.py"}  # in a process that is shut in


def faults(source):
    """What a file does that it should not."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"imports {n}" for n in names if n.split(".")[0] in MODULES]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if called in ("np.load", "numpy.load", "jnp.load") and given.get("allow_pickle") != "False":
            found.append("np.load without allow_pickle=False")
        if called in ("torch.load", "yaml.load", "os.system", "os.popen", "exec") or given.get("shell") == "True":
            found.append(f"calls {called}")
        if isinstance(node.func, ast.Name) and called in CALLS or called.rpartition(".")[2] in CALLS - {"eval"}:
            found.append(f"calls {called}")
    return found


def test_no_file_opens_what_can_run_code():
    bad = {str(p.relative_to(ROOT)): found for p in FILES if (found := faults(p.read_text(encoding="utf-8")))}
    assert {name: found for name, found in bad.items() if name not in EXECUTES} == {}
    assert set(bad) == EXECUTES and set(bad[next(iter(EXECUTES))]) == {"calls exec"}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from dill import load", "np.load(path)", "np.load(path, allow_pickle=True)", "eval(text)", "exec(text)",
        "torch.load(path)", "subprocess.run(x, shell=True)", "archive.extractall()", "shutil.unpack_archive(x)", "os.system(x)",
    ],
)  # fmt: skip
def test_the_test_can_fail(line):
    assert faults(line)
    assert not faults("np.load(path, allow_pickle=False)\nmodel.eval()\nsubprocess.run([x])")
