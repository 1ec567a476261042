"""A run that mixes sources, changes shape in stages, packs by a plan and skips a damaged shard: resumed, it is the same run."""
import importlib.util
import json

from data_pipeline import digest
from serpent_scale.config import load_config
from serpent_scale.training.streams import open_streams
from test_training import ROOT, SMALL, launch

STAGES = "training.stages=[{steps: 3, seq_len: 8, global_batch: 16}, {steps: 2, global_batch: 4}]"


def prepare(*arguments):
    spec = importlib.util.spec_from_file_location("prepare_data", ROOT / "launch" / "prepare_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main([str(a) for a in arguments])


def test_a_mixed_run_in_stages_resumes_to_the_bit(tmp_path):
    lines = [f"line {i}: the {i % 7} quick brown foxes jump over {i * i % 13} lazy dogs. " * (1 + i % 5) for i in range(400)]
    for name, part in dict(one=lines[:200], two=lines[200:360]).items():
        for split, texts in dict(train=part, validation=lines[360:]).items():
            (tmp_path / f"{name}-{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        tokenizer = "train:300" if name == "one" else str(tmp_path / "one/tokenizer.json")
        sources = (f"--source={split}={tmp_path}/{name}-{split}.jsonl" for split in ("train", "validation"))
        prepare(*sources, "--out", tmp_path / name, "--tokenizer", tokenizer, "--shard-tokens", 600, "--pack", 32)
    for shard in sorted((tmp_path / "two" / "train").glob("*.tar"))[::2]:
        shard.write_bytes(b"x" + shard.read_bytes()[1:])
    file = tmp_path / "c.yaml"
    file.write_text(SMALL.replace("DATA", str(tmp_path / "one")).replace("RUNS", str(tmp_path)))
    sources = f"data.sources=[{{path: {tmp_path}/one, weight: 0.7}}, {{path: {tmp_path}/two, weight: 0.3}}]"
    arguments = ["--config", str(file), STAGES, sources, "data.packing=best_fit", "data.on_error=skip", "training.max_steps=10",
                 "evaluation.every=0", "training.grad_clip=0"]  # fmt: skip
    history, warnings = {}, ""
    for name, stops in dict(straight=[10], broken=[4, 10]).items():
        for stop in stops:
            done = launch("pretrain.py", *arguments, f"run.name={name}", f"training.stop_at_step={stop}")
            assert done.returncode == 0, done.stderr
            warnings += done.stderr
        history[name] = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    exact = ("step", "loss", "grad_norm", "tokens", "data_digest", "tokens_skipped")
    straight, broken = ([[line[key] for key in exact] for line in lines if line["kind"] == "train"] for lines in history.values())
    assert straight == broken and len(straight) == 10 and "skipped, its" in warnings
    assert [line[3] for line in straight] == [128 * n for n in range(1, 6)] + [640 + 256 * n for n in range(1, 6)]
    stream, _ = open_streams(load_config(file, arguments[2:]))
    batches = [stream.batch(g, n) for g, n in ((0, 48), (48, 8), (56, 40))]
    assert straight[-1][4] == digest.to_hex(sum(batch.digest for batch in batches) % digest.MODULUS)
    assert straight[-1][5] == sum(batch.tokens_skipped for batch in batches) > 0
