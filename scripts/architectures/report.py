"""The results as tables: what was found, by kind, and which well-known models work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from architectures.check import LARGEST_RATIO

Row = dict[str, Any]

KINDS = ("ok", "ok in llmq, stock transformers fails", "refused", "crash", "wrong numbers", "not built")
_WORKS = KINDS[:2]
_BY_SEVERITY = ("not built", *KINDS[:-1])
_SHARE = 0.95  # of the weights of the blocks that must be packed, in so many of the classes
BEGIN, END = "<!-- architectures: begin -->", "<!-- architectures: end -->"

# What people call the models -> the type, or variant, that stands for them
FAMILIES = {
    "Llama 2, 3": "llama",
    "Mistral, Ministral": "mistral",
    "Qwen2, Qwen2.5": "qwen2",
    "Qwen3": "qwen3",
    "Qwen3.5": "qwen3_5_text",
    "Qwen3.5 with pictures": "qwen3_5@image",
    "Qwen2.5-VL": "qwen2_5_vl",
    "Qwen3-VL": "qwen3_vl",
    "Gemma 2": "gemma2",
    "Gemma 3": "gemma3_text",
    "Gemma 3 with pictures": "gemma3",
    "Gemma 4": "gemma4",
    "Mistral Small 3": "mistral3",
    "Phi-3, Phi-4": "phi3",
    "Granite 4 H": "granitemoehybrid@dense",
    "Falcon": "falcon",
    "Falcon-H1": "falcon_h1",
    "LFM2": "lfm2",
    "Mamba": "mamba",
    "Mamba-2": "mamba2",
    "Nemotron-H": "nemotron_h@dense",
    "RecurrentGemma": "recurrent_gemma",
    "GPT-2": "gpt2",
    "GPT-NeoX, Pythia": "gpt_neox",
    "OPT": "opt",
    "BLOOM": "bloom",
    "MPT": "mpt",
    "Mixtral": "mixtral",
    "Qwen3 MoE": "qwen3_moe",
    "DeepSeek-V3": "deepseek_v3",
    "Llama 4": "llama4_text",
    "gpt-oss": "gpt_oss",
    "GLM-4.5": "glm4_moe",
}


def kind(row: Row) -> str:
    """Return the first words of a result: one of KINDS."""
    return row["result"].partition(": ")[0]


def totals(rows: Sequence[Row]) -> Iterator[str]:
    """Yield how many classes have which result, and whether the bars are met.

    A class counts once, with the worst result of its types and variants. Those that were not built do not count.
    """
    without, having = (_by_class(row for row in rows if bool(row["experts"]) is wanted) for wanted in (False, True))
    yield "| result | types and variants | classes | classes without experts | classes with experts |"
    yield "|---|---|---|---|---|"
    counts = [Counter(map(kind, each)) for each in (rows, _by_class(rows), without, having)]
    for each in KINDS:
        yield f"| {' | '.join([each, *(str(count[each]) for count in counts)])} |"
    yield ""
    for which, classes in (("without", without), ("with", having)):
        built = [row for row in classes if kind(row) != "not built"]
        good = sum(kind(row) in _WORKS and (row["share"] or 0) >= _SHARE for row in built)
        packed = f"with at least {_SHARE:.0%} of their blocks packed: {good / max(len(built), 1):.1%}"
        yield f"- {good} of {len(built)} built classes {which} experts work {packed}; bar: 95 %"
    for bad in ("crash", "wrong numbers"):
        yield f"- {bad}: {counts[0][bad]}; bar: 0"
    above = [row["name"] for row in rows if (ratio(row) or 0) > LARGEST_RATIO]
    yield f"- error of gptq above {LARGEST_RATIO} x that of rtn: {', '.join(above) or 'none'}"


def _by_class(rows: Iterable[Row]) -> list[Row]:
    """Return one row for each class: that of the worst result, then of the smallest share."""
    found: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: (-_BY_SEVERITY.index(kind(row)), row["share"] or 0)):
        found.setdefault(row["class"] or row["name"], row)
    return list(found.values())


def ratio(row: Row) -> float | None:
    """Return the error of gptq divided by that of rtn, both of the whole model's logits."""
    return row["gptq_error"] / row["rtn_error"] if row.get("gptq_error") and row.get("rtn_error") else None


def table(rows: Iterable[Row]) -> Iterator[str]:
    """Yield a line for each type."""
    yield "| type | class | experts | result | packed | gptq / rtn | remark |"
    yield "|---|---|---|---|---|---|---|"
    for row in rows:
        times, experts = ratio(row), {True: "yes", False: "no", None: "–"}[row["experts"]]
        cells = [
            row["name"],
            row["class"] or "–",
            experts,
            row["result"],
            _percent(row),
            f"{times:.2f}" if times else "–",
        ]
        yield f"| {' | '.join(cells)} | {row['remark']} |"


def _percent(row: Row) -> str:
    return "–" if row["share"] is None else f"{100 * row['share']:.1f} %"


def page(rows: Sequence[Row]) -> str:
    """Return docs/architectures.md."""
    first = rows[0] if rows else {"transformers": "–", "date": "–"}
    head = f"""# Which architectures llmq quantizes

Every decoder of transformers {first["transformers"]} ({first["date"]}, on a CPU), as a tiny random model
with each kind of its layers: hidden size 64, 4 experts, sides that are multiples of 32 where those of real models are.
Quantized by rtn and gptq (4 bit, group 32, 8 texts of 48 tokens). Written by `python scripts/check_architectures.py`;
what it checks is said there.

- *ok*: llmq and stock transformers load both results, and the logits are those of the dense model with the dequantized
  weights. llmq generates that model's tokens, too. Stock transformers unpacks experts to float16; so it is compared
  with the dense model whose experts are rounded likewise.
- *packed*: the share of the weights of the decoder blocks that is packed, without routers. The rest stays in float, and
  works.
- Where stock transformers would put random weights in the place of packed experts, llmq stores gptq. transformers opens
  that with `optimum` and `gptqmodel` only; these are not installed here.
- *gptq / rtn*: the errors of the whole model's logits, divided. The texts are few and the weights random, so this only
  shows that gptq does no harm.
- Without the encoder, the cross-attention of the decoders of encoder-decoders (BART, Whisper, …) never runs. It is
  rounded to nearest.

## Totals

"""
    return head + "\n".join([*totals(rows), "", "## All types", "", *table(rows), ""])


def with_families(document: str, rows: Sequence[Row]) -> str:
    """Return the document with the table of well-known models between BEGIN and END. Raises ValueError without them."""
    before, _, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"the document lacks {BEGIN} or {END}")
    return "\n".join([before + BEGIN, *families(rows), END + after])


def families(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the table of well-known models."""
    by_name = {row["name"]: row for row in rows}
    yield "Tiny random models of these families; [docs/architectures.md](docs/architectures.md) lists all:"
    yield ""
    yield "| model | works | packed share of the blocks |"
    yield "|---|---|---|"
    for family, name in FAMILIES.items():
        if row := by_name.get(name):
            works = {"ok": "yes", _WORKS[1]: "in llmq; stock transformers fails"}.get(kind(row), kind(row))
            experts = "; experts stay in float" if row["experts"] and (row["share"] or 1) < _SHARE else ""
            yield f"| {family} | {works} | {_percent(row)}{experts} |"
