"""What is installed is what was built, and importing it changes nothing."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Neither the checkout nor its editable install may help.
CLEAN = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def execute(*command, cwd, **options):
    result = subprocess.run([*map(str, command)], cwd=cwd, env=CLEAN, capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    directory = tmp_path_factory.mktemp("dist")
    execute(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", directory, ROOT, cwd=directory)
    (built,) = directory.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The Python of a new environment that has the wheel, and sees the dependencies of this one."""
    directory = tmp_path_factory.mktemp("environment")
    venv.create(directory, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", "posix_prefix", {"base": directory, "platbase": directory}))
    execute(sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", packages, wheel, cwd=directory)
    # A plain path in a .pth file comes after the environment's own packages, and .pth files there are not run:
    # that is how editable installs would lead back to the checkout.
    (packages / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    return directory / "bin" / "python"


def test_kernels_is_no_package():
    """With an __init__.py, `import kernels` in the checkout would give it instead of Hugging Face's `kernels` package,
    which transformers imports where it is installed."""
    assert (ROOT / "kernels" / "llmq_kernels" / "__init__.py").is_file()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_wheel_holds_both_packages_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    metadata = {name for name in names if ".dist-info/" in name}
    assert {name.split("/")[0] for name in {*names} - metadata} == {"llmq", "llmq_kernels"}
    kinds = (".py", ".c", ".h")
    built = {name for name in names if name.endswith(kinds)}
    for package, parent in (("llmq", ROOT), ("llmq_kernels", ROOT / "kernels")):
        files = (path for path in (parent / package).rglob("*") if path.suffix in kinds)
        sources = {path.relative_to(parent).as_posix() for path in files}
        assert sources == {name for name in built if name.startswith(f"{package}/")}


def test_both_packages_of_the_installed_wheel_import_from_there(installed, tmp_path):
    code = "import llmq, llmq_kernels, json; print(json.dumps([llmq.__file__, llmq_kernels.__file__]))"
    files = [Path(file) for file in json.loads(execute(installed, "-c", code, cwd=tmp_path))]
    assert [file.parent.name for file in files] == ["llmq", "llmq_kernels"]
    assert all(file.is_relative_to(installed.parents[1]) for file in files)
    assert not any(file.is_relative_to(ROOT) for file in files)


def test_the_installed_package_knows_its_version(installed, tmp_path):
    code = "import llmq, importlib.metadata as m; print(m.version('llmq') == llmq.__version__)"
    assert execute(installed, "-c", code, cwd=tmp_path) == "True\n"


def test_the_installed_wheel_brings_the_llmq_command(installed, tmp_path):
    code = "from importlib.metadata import entry_points as e; e(name='llmq', group='console_scripts')['llmq'].load()()"
    assert "llmq quantize" in execute(installed, "-c", code, cwd=tmp_path)


def test_importing_llmq_touches_neither_cuda_nor_the_environment_nor_threads(installed, tmp_path):
    code = """
import json, os, torch
import accelerate, datasets, transformers.modeling_utils  # what these set is their own affair
before = dict(os.environ), torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
import llmq, llmq.cli, llmq.calibration.texts, llmq.runtime.evaluation
after = dict(os.environ), torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
print(json.dumps([before == after, torch.cuda.is_initialized()]))
"""
    assert json.loads(execute(installed, "-c", code, cwd=tmp_path)) == [True, False]
