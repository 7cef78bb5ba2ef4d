"""The sweep over all architectures: its models, its totals, and where its results go."""

import json

import pytest
from architectures import report
from architectures.sizes import NOT_BUILT
from architectures.tiny_models import names, tiny_config
from bench import pool
from commands import error_of, run_here


def row(name, result="ok", experts=False, share=1.0, errors=(0.2, 0.1), **others):
    about = {"class": f"{name}ForCausalLM", "remark": "", "date": "2026-11-28", "transformers": "5"} | others
    errors = {"rtn_error": errors[0], "gptq_error": errors[1]}
    return {"name": name, "result": result, "experts": experts, "share": share} | errors | about


def test_every_type_has_a_small_config_or_a_reason_not_to_be_built():
    for name in names():
        if name not in NOT_BUILT:
            text = tiny_config(name).get_text_config(decoder=True)
            assert text.vocab_size <= 384, name
            assert getattr(text, "num_hidden_layers", 2) <= 16, name


def test_a_class_counts_once_with_its_worst_type_and_experts_are_counted_apart():
    rows = [
        row("a"),
        row("a2", "refused: x", share=None, **{"class": "aForCausalLM"}),
        row("b", share=0.5),
        row("c", "ok in llmq, stock transformers fails: y"),
        row("d", "crash: z", experts=True, share=None),
        row("f", "ok in llmq, stock transformers fails: y", experts=True),
        row("e", "not built: w", experts=None, share=None),
        row("c@variant", "not built: v", share=None, **{"class": "cForCausalLM"}),
    ]
    lines = list(report.totals(rows))
    assert "| ok | 2 | 1 | 1 | 0 |" in lines
    assert "| refused | 1 | 1 | 1 | 0 |" in lines
    assert "| crash | 1 | 1 | 0 | 1 |" in lines
    assert "- 1 of 3 built classes without experts work with at least 95% of their blocks packed: 33.3%" in "\n".join(
        lines
    )
    assert "- 1 of 2 built classes with experts work with at least 95% of their blocks packed: 50.0%" in "\n".join(
        lines
    )
    assert "- crash: 1; bar: 0" in lines


def test_a_method_that_does_harm_is_named():
    assert list(report.totals([row("a"), row("b", errors=(0.1, 0.2))]))[-1].endswith("rtn: b")


def test_only_what_is_between_the_comments_is_replaced():
    document = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    made = report.with_families(document, [row("llama"), row("mixtral", experts=True, share=0.1)])
    assert made.startswith(f"before\n{report.BEGIN}\n")
    assert made.endswith(f"{report.END}\nafter\n")
    assert "old" not in made
    assert "| Llama 2, 3 | yes | 100.0 % |" in made
    assert "| Mixtral | yes | 10.0 %; experts stay in float |" in made
    assert report.with_families(made, [row("llama")]).count("| Llama") == 1
    with pytest.raises(ValueError, match="lacks"):
        report.with_families("nothing", [])


def test_it_goes_on_from_its_results_and_writes_the_report(tmp_path, monkeypatch):
    monkeypatch.setattr(
        pool, "run", lambda work, jobs, *_, **options: [(name, row(name, share=0.123)) for name in jobs]
    )
    results, output = tmp_path / "rows.jsonl", tmp_path / "page.md"
    results.write_text("".join(json.dumps(row(name)) + "\n" for name in names() if name not in ("blt", "llama")))
    done = run_here("check_architectures", "--results", results, "--output", output)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["name"] for line in results.read_text().splitlines()][-2:] == ["blt", "llama"]
    assert output.read_text().count("12.3 %") == 2


def test_a_model_that_ends_its_process_is_a_crash(tmp_path, monkeypatch):
    monkeypatch.setattr(
        pool, "run", lambda work, jobs, *_, **options: [(jobs[0], ChildProcessError("its process died"))]
    )
    results = tmp_path / "rows.jsonl"
    done = run_here("check_architectures", "--only", "llama", "--results", results)
    assert "| llama | – | – | crash: ChildProcessError: its process died |" in done.stdout
    assert json.loads(results.read_text())["result"].startswith("crash: ")


def test_an_unknown_name_is_refused(tmp_path):
    done = run_here("check_architectures", "--only", "lama", "--results", tmp_path / "rows.jsonl")
    assert done.returncode == 2
    assert "lama" in error_of(done)
