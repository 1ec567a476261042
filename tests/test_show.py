"""launch/show.py: Proposition 1 in float64 and on a model, and the page that shows a text by its clocks."""
import html
import importlib.util
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import expm
from scipy.stats import spearmanr

from data_pipeline.tokenizer import train_tokenizer
from serpent_scale.checkpoint import store
from serpent_scale.config import parse_config
from serpent_scale.evaluation import clock
from serpent_scale.evaluation import proposition as p1
from serpent_scale.model.documents import Documents
from serpent_scale.model.language_model import LanguageModel

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium")
TEXT = "The quick brown fox, aged 7, jumps over the café's laziest dog.\n</script><script>document.title='x'</script> Größe! " * 5
TICKS = 1 << 20


def show(*arguments):
    """launch/show.py in this process. Raises SystemExit(2) where it refuses."""
    spec = importlib.util.spec_from_file_location("show", ROOT / "launch/show.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main([*map(str, arguments)])


def build(pattern, **serpent):
    """A model whose clocks have something to say, and its configuration."""
    torch.manual_seed(0)
    config = parse_config({
        "model": {"vocab_size": 300, "d_model": 32, "n_layers": 2, "pattern": pattern, "serpent": {"band": 2.0, **serpent}},
        "training": {"max_steps": 1}, "schedule": {"warmup_steps": 0},
    })
    model = LanguageModel(config.model).eval()
    for name, parameter in model.named_parameters():
        if "clock_weight" in name:
            parameter.data.normal_(std=0.8)
    return model, config


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder with `model` (SeRpEnt), `routed` (with that clock), `plain` (Mamba) and text.txt."""
    folder = tmp_path_factory.mktemp("show")
    train_tokenizer([TEXT * 2], 300, folder / "tokenizer.json")
    tokenizer = (folder / "tokenizer.json").read_text()
    for name, pattern in (("model", ["mamba", "serpent"]), ("plain", ["mamba"]), ("routed", ["mamba", "serpent"])):
        model, config = build(pattern, **({"clock": "routed"} if name == "routed" else {"band": 8.0}))  # reached by one
        store.save_parameters(folder / name, model.state_dict(), {"config.yaml": config.to_yaml(), "tokenizer.json": tokenizer})
    (folder / "text.txt").write_text(TEXT)
    return folder


# Proposition 1.


@pytest.mark.parametrize("imaginary", [False, True])
@pytest.mark.parametrize("removal", p1.REMOVALS)
@pytest.mark.parametrize("rule", p1.RULES)
def test_the_effect_of_an_element_is_linear_in_its_interval(rule, removal, imaginary):
    for element, seed in ((0, 0), (40, 1), (63, 2)):
        fit = p1.fit(p1.Sequence.random(seed=seed, imaginary=imaginary), element, rule, removal)
        assert abs(fit.slope - 1) < 1e-3
        assert fit.found == pytest.approx(fit.predicted, rel=1e-3)
    assert fit.predicted > 1e-3
    large = [p1.Sequence.random().changed(40, dt=dt).effect(40, rule, removal) for dt in (0.5, 1.0)]
    assert (abs(np.log2(large[1] / large[0]) - 1) > 0.05) == (rule == "zoh")  # a limit, but that Euler's step is linear in dt


def test_the_states_are_those_of_the_differential_equation():
    """zoh against the matrix exponential of [[A, B x], [0, 0]]; euler against its limit, zoh, with many small steps."""
    sequence = p1.Sequence.random(length=20, states=3)
    h = np.zeros(3)
    for b, x, dt in zip(sequence.B, sequence.x, sequence.dt):
        system = np.zeros((4, 4))
        system[:3, :3], system[:3, 3] = np.diag(sequence.A), b * x
        h = (expm(dt * system) @ np.append(h, 1))[:3]
    np.testing.assert_allclose(sequence.state("zoh"), h, rtol=1e-12)
    fine = p1.Sequence(sequence.A, *(np.repeat(v, 2000, 0) for v in (sequence.B, sequence.x, sequence.dt / 2000)))
    np.testing.assert_allclose(fine.state("euler"), h, rtol=1e-4)


@pytest.mark.parametrize("inner", ["mamba", "mamba2"])
def test_correlations_delete_the_element_they_name(inner):
    model, _ = build([inner, "serpent"], inner="mamba" if inner == "mamba2" else "mamba")
    tokens = torch.randint(0, 300, (120,))
    found = p1.correlations(model, tokens, before=64, after=8, samples=5)
    assert [c.what for c in found] == ["layer 0, every token: dt", "layer 1, every token: dt", "layer 1, rate 0.5: clock",
                                       "layer 1, rate 0.25: clock"]
    with torch.no_grad():  # the last of the five samples, by hand: the tokens 47 to 119 of layer 0, and 111 left out
        x, _ = model.blocks[0].norm(model.embedding(tokens[None]), None)
        x, kept = x[:, 47:], [i for i in range(73) if i != 64]
        whole, part = (model.blocks[0].mixer(v, Documents.whole(1, v.shape[1]))[1].ssm for v in (x, x[:, kept]))
    assert found[0].effects[-1] == pytest.approx(float((whole - part).norm() / whole.norm()), rel=1e-4)
    c = p1.Correlation("", np.array([1.0, 2.0, 2.0, 3.0, 0.5]), np.array([0.1, 0.3, 0.2, 0.9, 0.5]))
    assert c.rank == pytest.approx(spearmanr(c.intervals, c.effects).statistic)
    assert np.isnan(p1.Correlation("", np.ones(5), c.effects).rank)


def test_it_finds_the_relation_where_there_is_one():
    """A Mamba whose step is one number for all channels, of much spread between tokens, and that forgets slowly."""
    model, _ = build(["mamba"])
    mixer = model.blocks[0].mixer
    mixer.conv_weight.data[:] = torch.tensor([1.0, 0, 0, 0])
    mixer.A_log.data.fill_(-4)
    mixer.dt_proj.weight.data.fill_(1)
    mixer.dt_bias.data.fill_(-5)
    mixer.x_proj.weight.data[: mixer.rank] *= 8
    first = p1.correlations(model, torch.randint(0, 300, (600,)))[0]
    assert first.intervals.max() > 20 * first.intervals.min() and first.rank > 0.8, first.rank


def test_the_command_prints_slopes_and_correlations(checkpoints, capsys, tmp_path):
    show("proposition1", "--checkpoint", checkpoints / "model", "--text", checkpoints / "text.txt", "--out", tmp_path / "p1.png")
    said = capsys.readouterr().out
    slopes = [float(line.split()[2]) for line in said.splitlines() if line.startswith(("zoh", "euler"))]
    assert len(slopes) == 4 and all(abs(slope - 1) < 1e-3 for slope in slopes)
    assert "layer 1, rate 0.5: clock" in said and Image.open(tmp_path / "p1.png").size[0] > 1000


# The clock.


def test_clocks_are_those_of_the_layer_written_out():
    model, config = build(["mamba", "serpent"])
    tokens = torch.randint(0, 300, (200,))
    branches = clock.clocks(model, tokens)
    assert [(b.layer, b.rate) for b in branches] == [(1, 0.5), (1, 0.25)]
    for b in branches:
        assert (b.low, b.high, b.band) == (b.rate / 2, b.rate * 2, 2.0)
        assert b.interval.std() > 0.1 * b.rate and b.low < b.interval.min() and b.interval.max() < b.high
        dev, count = 0, 0
        for i, interval in enumerate(b.interval):
            free = dev + round(float(np.float32(interval) * np.float32(TICKS))) - round(b.rate * TICKS)
            dev = max(-2 * TICKS, min(2 * TICKS, free))
            now = (TICKS - 1 + (i + 1) * round(b.rate * TICKS) + dev) // TICKS
            assert b.ahead[i] == pytest.approx(dev / TICKS, abs=1e-6)
            assert (b.emits[i], b.cut[i]) == (now > count, dev != free), i
            count = now
        assert b.realised == pytest.approx(count / 200) and 0 < b.saturation < 1
    _, states = model(tokens[None])  # as many as the layer has emitted: its clock's position in the state
    for b, branch in zip(branches, states[1][1:]):
        assert branch.window.dev.item() / TICKS == pytest.approx(b.ahead[-1], abs=1e-6)


def test_a_routed_clock_is_that_of_the_layer_written_out():
    model, _ = build(["mamba", "serpent"], clock="routed")
    tokens, heard = torch.randint(0, 300, (200,)), []
    layer = model.blocks[1].mixer
    hook = layer.register_forward_pre_hook(lambda _, arguments: heard.append(arguments[0][0]))
    branches = clock.clocks(model, tokens)
    hook.remove()
    for b, branch in zip(branches, layer.branches[1:], strict=True):
        assert b.routed and not b.cut.any() and b.rate == branch.rate
        keys = heard[0] @ branch.key_weight.t()
        likeness = torch.cosine_similarity((heard[0] @ branch.query_weight.t())[1:], keys[:-1], dim=-1)
        p = np.append(1, (1 - likeness.detach().numpy()) / 2)
        np.testing.assert_allclose(b.interval, p, atol=1e-5)
        assert ((p > 0.501) <= b.emits).all() and (b.emits <= (p > 0.499)).all() and 0 < b.realised < 1
        assert b.ahead[-1] == pytest.approx(b.emits.sum() - 200 * b.rate)
        np.testing.assert_allclose(b.shades, 2 * p - 1, atol=1e-5)


def test_places_in_words():
    pieces = ["The", " qu", "ick", "ly", ",", " 7", " ", "\n", "a", "b", " don", "'", "t", "", "(f", "oo"]
    names = ["" if p < 0 else clock.PLACES[p] for p in clock.places_in_words(pieces)]
    first, inside, last = clock.PLACES[1:4]
    other, space, whole = "punctuation, digits", "white space", "whole word"
    assert names == [whole, first, inside, last, other, other, space, space, first, last, whole, other, whole, "", first, last]


def test_pieces_are_the_text(checkpoints):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(checkpoints / "tokenizer.json"))
    text = "naïve 東京 café\n\n 🙂."
    ids, pieces = clock.encode(tokenizer, text, 10**6)
    assert "".join(pieces) == text and len(ids) == len(pieces)
    assert clock.encode(tokenizer, text, 4) == (ids[:4], pieces[:4])


class Page(HTMLParser):
    """Elements as a browser left them: counts by name, the text's tokens, and links out of the page."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.found, self.links, self.inside, self.tokens, self.emitting = {}, [], 0, [], 0
        self.feed(text)

    def handle_starttag(self, name, attributes):
        attributes = dict(attributes)
        self.found[name] = self.found.get(name, 0) + 1
        self.links += [v for k, v in attributes.items() if k in ("src", "href")]
        self.inside += self.inside > 0 or attributes.get("id") == "text"
        if self.inside and name == "span":
            self.tokens.append("")
            self.emitting += "e" in (attributes.get("class") or "").split()

    def handle_endtag(self, name):
        self.inside -= self.inside > 0

    def handle_data(self, text):
        if self.inside > 1:
            self.tokens[-1] += text


@pytest.mark.parametrize("name", ["model", "routed"])
def test_the_page_draws_itself_in_a_browser(checkpoints, tmp_path, capsys, name):
    text = tmp_path / "<!--<script>.txt"  # unescaped, it would hide the end of the script element that it stands in
    text.write_text(TEXT)
    show("clock", "--checkpoint", checkpoints / name, "--text", text, "--out", tmp_path)
    assert "rate 0.25" in capsys.readouterr().out
    picture = Image.open(tmp_path / "clock.png").convert("RGB")
    assert picture.size[0] > 1500 and len(picture.getcolors(picture.size[0] * picture.size[1])) > 200
    written = (tmp_path / "clock.html").read_text()
    assert "default-src 'none'" in written and not Page(written).links
    assert written.count("<script") == 2 and not re.search(r"url\(|@import", written)
    embedded = re.search(r'id="data">(.*?)</script>', written, re.S)[1]
    data = json.loads(embedded)
    assert "<" not in embedded and data["source"] == text.name
    assert "".join(data["pieces"]) == TEXT and len(data["branches"]) == 2
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    browser = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
               f"--user-data-dir={tmp_path}/profile", "--window-size=1240,1600", "--virtual-time-budget=2000"]
    browser += ["--dump-dom", f"--screenshot={tmp_path / 'shot.png'}"]
    addresses = [f"file://{tmp_path}/clock.html#{i}" for i in ((1,) if name == "routed" else (0, 1))]
    *other, dom = [subprocess.run([*browser, url], capture_output=True, text=True, timeout=60).stdout for url in addresses]
    page = Page(dom)
    assert html.unescape(re.search("<title>(.*?)</title>", dom)[1]) == f"Clock of run, {name}"
    assert ("something new begins" in dom.split("<script")[0]) == (name == "routed")
    assert page.tokens[0] == "start" and "".join(page.tokens[1:]).replace("↵", "") == TEXT
    assert page.emitting == data["branches"][1]["emits"].count("1")
    assert page.found["svg"] == 3 and page.found["button"] == 2 and dom.count('aria-pressed="true"') == 1
    dashed = [tuple(word in drawn.split("<script")[0] for word in ("between the dashed lines", "stroke-dasharray"))
              for drawn in (*other, dom)]
    assert dashed == ([(False, False)] if name == "routed" else [(True, True), (False, False)])
    shot = Image.open(tmp_path / "shot.png").convert("RGB")
    assert len(shot.getcolors(shot.size[0] * shot.size[1])) > 100


@pytest.mark.parametrize("arguments, words", [
    (["clock", "--checkpoint", "plain", "--text", "text.txt", "--out", "o"], ["model.pattern=[mamba]", "has no clock"]),
    (["clock", "--checkpoint", "model", "--text", "nowhere.txt", "--out", "o"], ["nowhere.txt", "No such file"]),
    (["clock", "--checkpoint", "model", "--text", "text.txt", "--out", "o", "--max-tokens", "5"], ["5 tokens are too few"]),
    (["clock", "--checkpoint", "nowhere", "--text", "text.txt", "--out", "o"], ["nowhere: no such checkpoint"]),
    (["proposition1", "--checkpoint", "model"], ["--checkpoint and --text go together"]),
])  # fmt: skip
def test_bad_input_ends_in_one_line(checkpoints, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(checkpoints)
    with pytest.raises(SystemExit) as end:
        show(*arguments)
    message = capsys.readouterr().err
    assert end.value.code == 2 and message.count("\n") == 1 and all(word in message for word in words), message
    assert not (checkpoints / "o").exists()
