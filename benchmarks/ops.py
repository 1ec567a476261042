"""Every kernel of `kernels/`: first checked against a float64 reference, then timed, beside other projects' where installed.

    python benchmarks/ops.py                      # all
    python benchmarks/ops.py --op selective_scan ssd --append

"forward" is the forward pass of training: it keeps what the backward pass needs. `op_cases.py` says what is called with what.
"""
from __future__ import annotations

import argparse
import math
import warnings

import harness
import torch
from harness import DEVICE, Ceilings, Spread
from op_cases import ACTIVATION, Case, Form, Inputs, activations, cases, documents
from torch import Tensor

COLUMNS = ["mamba_ssm", "causal_conv1d", "fla", "Liger"]
PACKAGES = ["mamba_ssm", "causal_conv1d", "fla", "liger_kernel"]



def leaves(inputs: Inputs, backward: bool) -> Inputs:
    return {k: v.detach().requires_grad_(backward and v.is_floating_point()) for k, v in inputs.items()}


def as_tuple(out: object) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def gradients(outs: tuple[Tensor, ...], inputs: Inputs, directions: list[Tensor]) -> dict[str, Tensor]:
    names = [k for k, v in inputs.items() if v.requires_grad]
    grads = torch.autograd.grad(outs, [inputs[k] for k in names], directions, allow_unused=True)
    return {f"d{k}": g for k, g in zip(names, grads)}


def run(case: Case, form: Form, inputs: Inputs, directions: list[Tensor] | None) -> dict[str, Tensor]:
    """Outputs and gradients of one implementation, in our layout."""
    own = leaves({k: v.clone() for k, v in inputs.items()}, case.backward)
    outs = tuple(form.restore(o) for o in as_tuple(form.call(**form.adapt(own))))
    result = {f"out{i}" if i else "out": o.detach() for i, o in enumerate(outs)}
    if case.backward:
        result |= gradients(outs, own, [d.to(o.dtype) for d, o in zip(directions, outs)])
    return result


def check_rows(case: Case, implementations: dict[str, Form], failures: list[str]) -> list[list[str]]:
    """Errors against float64 of each implementation, on the same inputs; ours also twice, bit for bit, on poisoned memory."""
    torch.manual_seed(1)
    inputs = case.check_inputs()
    exact = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    with torch.no_grad():
        shapes = as_tuple(case.reference(**{k: v.clone() for k, v in exact.items()}))
    directions = [torch.randn_like(s).to(ACTIVATION).double() for s in shapes]
    want = run(case, Form(case.reference), exact, directions)
    rows = []
    for name, form in implementations.items():
        try:
            if name == "ours":
                torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory with NaN
                warnings.simplefilter("ignore")  # of torch's own operations without such a form
            got, twice = run(case, form, inputs, directions), None
            if name == "ours":
                again = run(case, form, inputs, directions)
                twice = all(torch.equal(got[k], again[k]) for k in got if got[k] is not None)
            errors = {k: harness.relative_error(got[k], want[k]) for k in want if want[k] is not None and got[k] is not None}
            errors |= {k: float("nan") for k in want if want[k] is not None and got[k] is None}
            out = max((v for k, v in errors.items() if k.startswith("out")), key=_nan_first)
            worst = max((k for k in errors if k.startswith("d")), key=lambda k: _nan_first(errors[k]), default=None)
            rows.append([case.op, case.name, name, f"{out:.1e}", f"{errors[worst]:.1e} ({worst})" if worst else "-",
                         {True: "yes", False: "NO", None: ""}[twice]])  # fmt: skip
        except Exception as error:
            failures.append(f"{case.op}, {case.name}, {name}: check failed, {harness.one_line(error)}")
        finally:
            torch.use_deterministic_algorithms(False)
    return rows


def _nan_first(value: float) -> float:
    return math.inf if math.isnan(value) else value


def time_form(case: Case, form: Form, seconds: float) -> dict[str, tuple[Spread, int]]:
    """Pass -> (time, least bytes it must move: each input and gradient once, each output once)."""
    torch.manual_seed(2)
    first = leaves(form.adapt(case.inputs()), case.backward)
    read = sum(v.nbytes for v in first.values())
    grads = sum(v.nbytes for v in first.values() if v.requires_grad)
    count = harness.sets_beyond_cache(read)
    sets = [first] + [leaves(form.adapt(case.inputs()), case.backward) for _ in range(count - 1)]
    outs = as_tuple(form.call(**first))
    written = sum(o.nbytes for o in outs)
    result = {"forward": (harness.time_calls([lambda i=i: form.call(**i) for i in sets], seconds), read + written)}
    if case.backward:
        directions = [torch.randn_like(o) for o in outs]

        def both(inputs: Inputs) -> object:
            return gradients(as_tuple(form.call(**inputs)), inputs, directions)

        moved = 2 * (read + written) + grads
        result["forward + backward"] = (harness.time_calls([lambda i=i: both(i) for i in sets], seconds), moved)
    return result


def time_rows(
    case: Case, implementations: dict[str, Form], ceilings: Ceilings, seconds: float, failures: list[str]
) -> list[list[str]]:
    times = {}
    for name, form in implementations.items():
        try:
            times[name] = time_form(case, form, seconds)
        except Exception as error:
            failures.append(f"{case.op}, {case.name}, {name}: timing failed, {harness.one_line(error)}")
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
    rows = []
    for what in ["forward", "forward + backward"][: 1 + case.backward]:
        if case.flops and what == "forward":
            continue  # both passes in one
        own, moved = times["ours"][what] if "ours" in times else (None, 0)
        if own is None:
            rate = "-"
        elif case.flops:
            rate = share(case.flops / own.median * 1e3, ceilings.matmul, "TFLOP/s")
        else:
            rate = share(moved / own.median * 1e3, ceilings.copy, "TB/s")
        peers = {n: times[n][what][0] for n in COLUMNS if n in times}
        faster = f"{min(p.median for p in peers.values()) / own.median:.2f}" if peers and own else "-"
        rows.append([
            case.op, case.name, what, own.text(harness.milliseconds) if own else "failed", rate,
            *(harness.milliseconds(peers[n].median) if n in peers else "-" for n in COLUMNS), faster,
        ])
    return rows


def layer_rows(small: bool, seconds: float, failures: list[str]) -> list[list[str]]:
    """A Mamba and a SeRpEnt layer of equal parameters, forward and backward, and what their kernels are for."""
    from serpent_scale.config import ModelConfig
    from serpent_scale.model.language_model import build_mixer

    batch, length, d_model = (1, 64, 48) if small else (8, 2048, 1024)
    rows, first = [], None
    for name in ("mamba", "serpent"):
        try:
            torch.manual_seed(3)
            with torch.device(DEVICE):
                layer = build_mixer(name, ModelConfig(d_model=d_model))
            whole = documents(batch, length, False)
            inputs = [activations(batch, length, d_model).requires_grad_() for _ in range(4)]
            direction, parameters = activations(batch, length, d_model), list(layer.parameters())

            def both(i: int) -> None:
                with torch.autocast(DEVICE, torch.bfloat16):
                    y, _ = layer(inputs[i % 4], whole)
                torch.autograd.grad(y, [inputs[i % 4], *parameters], direction.to(y.dtype))

            time = harness.time_calls([lambda i=i: both(i) for i in range(4)], seconds)
            first = first or time.median
            families = harness.by_family(harness.kernel_times(both, 8)[0]) if DEVICE == "cuda" else {}
            busy = sum(families.values())
            parts = ", ".join(f"{k} {100 * v / busy:.1f} %" for k, v in families.most_common()) if busy else "-"
            shape = f"B{batch} L{length} d{d_model}"
            rows.append([name, shape, time.text(harness.milliseconds), f"{first / time.median:.2f}", parts])
        except Exception as error:
            failures.append(f"{name} layer: failed, {harness.one_line(error)}")
    return rows


def share(rate: float, ceiling: float, unit: str) -> str:
    return f"{rate / 1e12:.{2 if unit == 'TB/s' else 0}f} {unit} ({100 * rate / ceiling:.0f} %)"


def installed(case: Case, failures: list[str]) -> dict[str, Form]:
    """Ours and the peers that can be imported."""
    forms = {}
    for name, build in {"ours": case.ours, **case.peers}.items():
        try:
            forms[name] = build()
        except Exception as error:
            if getattr(error, "name", None) not in PACKAGES:
                failures.append(f"{case.op}, {name}: cannot be imported, {harness.one_line(error)}")
    return forms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="*", metavar="OP", help="these ops only; `layer` is a whole layer")
    parser.add_argument("--seconds", type=float, default=0.3, help="time measured for each number")
    parser.add_argument("--small", action="store_true", help="tiny cases, to try the script")
    parser.add_argument("--no-check", action="store_true", help="time only")
    harness.add_report_arguments(parser)
    arguments = parser.parse_args()
    ceilings = harness.measure_ceilings(256 if arguments.small else None)
    print(ceilings.text(), flush=True)
    checks, times, failures = [], [], []
    for case in cases(arguments.small):
        if arguments.op and case.op not in arguments.op:
            continue
        print(f"{case.op}, {case.name}", flush=True)
        forms = installed(case, failures)
        if not arguments.no_check:
            try:
                checks += check_rows(case, forms, failures)
            except Exception as error:
                failures.append(f"{case.op}, {case.name}: no reference, {harness.one_line(error)}")
        times += time_rows(case, forms, ceilings, arguments.seconds, failures)
    layers = layer_rows(arguments.small, arguments.seconds, failures) if not arguments.op or "layer" in arguments.op else []
    parts = []
    if checks:
        head = ["op", "case", "implementation", "error, output", "error, worst gradient", "bitwise repeatable"]
        parts.append(harness.table(head, checks))
    if times:
        peers = [f"{name}, ms" for name in COLUMNS]
        head = ["op", "case", "pass", "ours, ms (10-90 %)", "of the ceiling", *peers, "× best peer"]
        parts.append(harness.table(head, times))
    if layers:
        head = ["layer", "case", "forward + backward, ms (10-90 %)", "× Mamba", "of its kernels' time"]
        parts.append(harness.table(head, layers))
    failures = list(dict.fromkeys(failures))
    harness.report("Kernels", [f"Ceilings: {ceilings.text()}.", *parts, "\n".join(f"- {f}" for f in failures)], arguments)


if __name__ == "__main__":
    main()
