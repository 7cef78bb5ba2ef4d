"""A function is called once a module has been imported, whoever imports it, and not before."""

import importlib
import sys

import pytest
from commands import execute_python

from llmq.core.after_import import after_import

KNOWN = "import transformers.quantizers.auto as auto; print('llmq' in auto.AUTO_QUANTIZER_MAPPING)"


def test_it_is_called_when_somebody_imports_the_module_and_only_then(tmp_path, monkeypatch):
    (tmp_path / "module_of_this_test.py").write_text("value = 3")
    monkeypatch.syspath_prepend(tmp_path)
    seen = []
    after_import("module_of_this_test", lambda: seen.append(sys.modules["module_of_this_test"].value))
    importlib.import_module("json")
    assert seen == []
    importlib.import_module("module_of_this_test")
    importlib.import_module("module_of_this_test")
    assert seen == [3]


def test_it_is_called_at_once_for_a_module_that_is_there():
    seen = []
    after_import("sys", lambda: seen.append("now"))
    assert seen == ["now"]


@pytest.mark.parametrize(
    "first",
    ["import llmq", "from transformers import AutoModelForCausalLM; import llmq"],
)
def test_transformers_knows_llmq_whichever_of_them_is_imported_first(first):
    assert execute_python(f"{first}; from transformers import AutoModelForCausalLM; {KNOWN}") == "True\n"


def test_importing_llmq_imports_neither_torch_nor_transformers():
    code = "import sys, llmq; print(sorted({'torch', 'transformers', 'tyro'} & sys.modules.keys()))"
    assert execute_python(code) == "[]\n"


def test_the_help_of_inspect_does_not_import_transformers():
    code = "import sys\nfrom llmq.inspect import main\nsys.argv[1:] = ['--help']\ntry: main()\n"
    code += "except SystemExit: print('transformers' in sys.modules)"
    assert execute_python(code).endswith("False\n")


def test_importing_the_program_leaves_the_function_of_its_name():
    code = "import llmq, llmq.quantize; from llmq import quantize; print(callable(llmq.quantize), quantize.__module__)"
    assert execute_python(code) == "True llmq.pipeline\n"
