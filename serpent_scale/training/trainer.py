"""The training loop: build, resume, step, evaluate, save."""
from __future__ import annotations

import math
import sys
import time
from collections import deque
from pathlib import Path

import torch

from data_pipeline import digest
from data_pipeline.files import write_atomically
from serpent_scale.checkpoint import store
from serpent_scale.checkpoint.version import code_version
from serpent_scale.config import Config, check_same_model
from serpent_scale.errors import UserError
from serpent_scale.model.accounting import flops_per_token
from serpent_scale.model.language_model import LanguageModel
from serpent_scale.parallel import watchdog
from serpent_scale.parallel.processes import Processes, all_reduce_sum, before_stop, broadcast_object, on_every_rank, on_rank_zero
from serpent_scale.parallel.sequence import Sequence, load
from serpent_scale.training import badsteps, signals, validation
from serpent_scale.training.batches import DeviceBatch, send
from serpent_scale.training.engine import build_engine, check_gradients, loss_divisor
from serpent_scale.training.graphs import GraphedForward
from serpent_scale.training.hardware import peak_flops, peak_memory_gib
from serpent_scale.training.metrics import Metrics
from serpent_scale.training.optimizer import apply_settings, learning_rate
from serpent_scale.training.readback import Readback
from serpent_scale.training.replicas import check_replicas
from serpent_scale.training.run_folder import find_checkpoint, newest_checkpoint
from serpent_scale.training.streams import first_sample, open_streams


class Trainer:
    """One pretraining run. Raises UserError for anything the user can mend, on all ranks together.

    start: what the run goes on from. `auto`: the newest checkpoint that verifies, or nothing if there is none at all; `none`:
    nothing, refused where checkpoints are; else the path of a checkpoint, or of parameters alone.
    """

    def __init__(self, config: Config, processes: Processes, start: str):
        self.config, self.processes = config, processes
        accumulation = config.grad_accumulation(processes.world_size)  # refuses what does not divide
        self.samples = config.samples
        device = processes.device
        self.stream, self.validation = open_streams(config)
        self.texts = {"config.yaml": config.to_yaml(), "tokenizer.json": self.stream.index.tokenizer_path.read_text()}
        self.replicas, self.replica, self.sequence = processes.world_size, processes.rank, None
        if config.parallel.sequence > 1:
            self.sequence = Sequence(config.parallel.sequence, processes.world_size, device)
            self.replicas, self.replica = config.replicas(processes.world_size), self.sequence.replica
            check_gradients(config, self.sequence, processes)

        torch.manual_seed(config.run.seed)  # the same parameters on every rank, whatever the world size
        model = LanguageModel(config.model, config.training.activation_checkpointing)
        self.start = on_rank_zero(lambda: find_checkpoint(start, self.checkpoints))
        if self.start is not None and store.parameters_alone(self.start):
            self._begin_with_parameters(model)
        model.to(device)
        self.engine, self.optimizer = build_engine(model, config, processes)
        training = config.training
        graphs = training.cuda_graphs and training.zero_stage < 3 and not training.activation_checkpointing
        if graphs and device.type == "cuda" and model.fixed_shapes:
            shard = {"shard": self.sequence.shard} if self.sequence else {}
            model.forward = GraphedForward(model, accumulates=bool(training.stages) or accumulation > 1, **shard)
            before_stop(model.forward.release)
        self.flops = flops_per_token(config.model, config.data.seq_len).training
        self.peak = peak_flops(config, device) * processes.world_size
        self.step, self.tokens, self.wandb_id, self.metrics = 0, 0, None, None
        dump = config.run_folder / badsteps.NAME if processes.rank == 0 else None
        self.bad_steps = badsteps.BadSteps(config.training.max_bad_steps, dump)
        self.spikes, self.rollbacks = badsteps.SpikeDetector(config.training.spike_zscore), 0
        self.skipped = 0  # samples left out by rollbacks
        self.evaluation_due, self.stopping, self.saved_at = False, False, None
        self.writing: store.Save | None = None  # a checkpoint on its way to the disk
        self.written = True  # by all ranks
        self.copies: dict[str, torch.Tensor] = {}  # host memory that checkpoints are written from
        self.digest = 0  # of all samples consumed, by all ranks
        self.code = code_version()
        self.ahead: tuple[tuple[int, int], DeviceBatch] | None = None  # a batch fetched before its turn, and its step and pass

    @property
    def checkpoints(self) -> Path:
        return self.config.run_folder / "checkpoints"

    def _begin_with_parameters(self, model: LanguageModel) -> None:
        """Before DeepSpeed takes the model over: its optimizer keeps copies of what it finds."""
        path = self.start

        def read() -> None:
            state = store.read_full_state(path)
            check_same_model(self.config, path / "config.yaml")
            model.load_state_dict(state)

        on_every_rank(read)
        self.start = None
        if self.processes.rank == 0:
            print(f"begins with the parameters of {path}, at step 0", flush=True)

    def resume(self) -> None:
        path = self.start
        if path is None:
            return
        state = self._take_up(path)
        if self.processes.rank == 0:
            print(f"resumed from {path}, step {self.step}", flush=True)
            if state.get("code") != self.code:
                print(f"note: another version of the code wrote it: {state.get('code')}, this is {self.code}", flush=True)
            if state["data"]["format"] == 1:
                print(f"note: it has no digest of its samples; data_digest counts those after step {self.step}", flush=True)

    def _take_up(self, path: Path) -> dict:
        """Go on from a checkpoint: its `trainer.json`."""
        watchdog.beat(f"loading {path.name}")
        state = store.load(self.engine, path, lambda: check_same_model(self.config, path / "config.yaml"))
        apply_settings(self.optimizer, self.config)
        self.step, self.tokens, self.wandb_id, self.ahead = state["step"], state["tokens"], state["wandb_id"], None
        samples, self.digest = self.stream.check_state(state["data"])
        self.skipped, self.rollbacks, self.evaluation_due = state["skipped"], state["rollbacks"], state["evaluation_due"]
        self.spikes.losses = deque(state["losses"], maxlen=badsteps.WINDOW)
        self.saved_at = None if self.evaluation_due else self.step
        if samples != self._next_sample():
            samples -= self.skipped
            raise UserError(
                f"{path}: written with another training.global_batch ({samples} samples in {self.step} steps); "
                "set the one it was begun with" + ("" if self.config.training.stages else f", {samples // max(self.step, 1)}")
            )
        return state

    def train(self) -> bool:
        """Run to the budget, or to training.stop_at_step; False when a signal ended it before, after a checkpoint."""
        config = self.config
        last = min(config.total_steps, config.training.stop_at_step or config.total_steps)
        if self.step >= last and not self.evaluation_due:
            if self.processes.rank == 0:
                keys = "training.stop_at_step" if last < config.total_steps else "training.max_steps or training.max_tokens"
                print(f"nothing to do: the run is at step {self.step} and was to end at {last}; raise {keys} to go on", flush=True)
            return True
        on_rank_zero(self._begin_record)
        self.evaluation_due |= self.step == 0 and config.evaluation.every > 0
        self._agree_to_stop()
        while True:
            if self.evaluation_due and not self.stopping:
                self.evaluate()
            self._save_if_due(ends := self.stopping or self.step >= last)
            if ends:
                break
            values = self.train_step()
            self._log(values)
            self.evaluation_due = self.step >= last or bool(config.evaluation.every and self.step % config.evaluation.every == 0)
            if config.training.check_replicas and self.step % config.training.check_replicas == 0:
                check_replicas(self.engine.module, self.step)
            if self.step > self.samples.stages[-1].step and self.spikes.is_spike(values["loss"]):
                self._roll_back(values["loss"])
        if self.metrics:
            self.metrics.close()
        return self.step >= last and not self.evaluation_due

    def train_step(self) -> dict[str, float]:
        """One optimizer step over the global batch: its metrics.

        The host waits for the device once, for the loss and the gradient norm. The update and what follows it are launched by
        then: while the device makes it, the host ends the step and begins the next.
        """
        started, tokens = time.perf_counter(), self.samples.tokens(self.step + 1) - self.samples.tokens(self.step)
        rate = learning_rate(self.step, self.config.schedule, self.config.total_steps, self.config.optimizer.lr)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        totals, data_seconds = torch.zeros(2, dtype=torch.float64, device=self.processes.device), 0.0
        consumed = skipped = 0
        before = self.sequence.elements.clone() if self.sequence else None
        losses, accumulation, model = [], self._begin_step(), self.engine.module
        if model.taught is not None:
            model.taught.zero_()
        for micro_step in range(accumulation):
            watchdog.beat(f"step {self.step + 1}, pass {micro_step + 1}")
            fetched = time.perf_counter()
            batch = self._batch(self.step, micro_step)
            data_seconds += time.perf_counter() - fetched
            consumed += batch.digest
            skipped += batch.tokens_skipped
            loss_sum = self._loss(batch)
            losses.append(loss_sum.detach())
            totals += self._totals(loss_sum, batch)
            # A fixed divisor: the global gradient does not depend on how documents fall on ranks. NaN where the loss is not
            # finite: its gradient may be, and then only no rank makes the step when every rank's gradient is not.
            self.engine.backward(loss_sum / torch.where(losses[-1].isfinite(), loss_divisor(self.config), math.nan))
            self._fetch_ahead(micro_step, accumulation)
            if self.writing is not None:
                self.writing.wait_for_copy()
            if micro_step + 1 == accumulation:
                figures = self._figures(totals, before, skipped, consumed)
            self.engine.step()
        loss_sum, labels, lessons, *rest = figures.tolist()
        elements, (skipped, stop, done, *limbs) = rest[: self.processes.world_size], rest[self.processes.world_size :]
        self.stopping, self.written = stop > 0, done == self.processes.world_size
        if skipped:
            self._agree_on_skipped(int(skipped))
        loss, norm = loss_sum / labels if labels else math.nan, float(self.engine.get_global_grad_norm())
        at_fault = [] if math.isfinite(loss) and math.isfinite(norm) else self._samples_at_fault(losses)
        self.bad_steps.count(self.step + 1, loss, norm, at_fault)
        self.step += 1
        self.digest = (self.digest + digest.from_limbs(limbs)) % digest.MODULUS
        self.tokens += tokens
        seconds = time.perf_counter() - started
        return {
            "loss": loss, "grad_norm": norm, "lr": rate, "tokens": self.tokens, "tokens_per_second": tokens / seconds,
            "mfu": self.flops * tokens / seconds / self.peak if self.peak else None, "memory_gib": peak_memory_gib(),
            "step_seconds": seconds, "data_seconds": data_seconds, "data_share": data_seconds / seconds,
            "data_digest": digest.to_hex(self.digest), "tokens_skipped": self.stream.tokens_skipped,
        } | ({"sequence_load": load(elements, self.config.parallel.sequence)} if any(elements) else {}) | (
            {} if model.taught is None else {"teach_loss": lessons / (accumulation * self.processes.world_size)})  # fmt: skip

    def _figures(self, totals: torch.Tensor, before: torch.Tensor | None, skipped: int, consumed: int) -> Readback:
        """Sums over ranks: totals, the lessons, each rank's elements, tokens skipped, ranks asked to stop, ranks that have written
        their checkpoint, limbs of the digest. Counts and limbs as float64, which holds them exactly: one collective for all."""
        device, done = self.processes.device, self.writing is None or self.writing.done
        counts = torch.tensor([skipped, signals.received() is not None, done, *digest.to_limbs(consumed)], dtype=torch.float64)
        elements = torch.zeros(self.processes.world_size, dtype=torch.float64, device=device)
        if self.sequence:
            elements[self.processes.rank] = self.sequence.elements - before
        taught = self.engine.module.taught
        taught = totals.new_zeros(1) if taught is None else taught.double()[None]
        return Readback(all_reduce_sum(torch.cat([totals, taught, elements, send(counts, device)])))

    @torch.no_grad()
    def evaluate(self) -> float | None:
        """Mean cross-entropy over windows of the evaluation split, shared by all ranks; None if a signal came."""
        stream, rows, carry = self.validation, self.config.training.micro_batch, self.config.evaluation.carry_state
        windows = min(stream.n_windows, self.config.evaluation.max_windows or stream.n_windows)
        totals, states = torch.zeros(2, dtype=torch.float64, device=self.processes.device), None
        accumulation = self.config.grad_accumulation(self.processes.world_size, self.step)
        self.engine.eval()
        passes = validation.in_order if carry else validation.apart
        for i, batch in enumerate(passes(stream, windows, rows, self.replicas, self.replica)):
            watchdog.beat(f"evaluation after step {self.step}")
            if i % accumulation == 0 and self._agree_to_stop():  # about as often as in training
                self.engine.train()
                return None
            batch = DeviceBatch.of(batch, self.processes.device, self.sequence, carry)
            loss_sum, after = self.engine(batch.tokens, batch.documents, batch.labels, states)
            if carry:
                states = self.sequence.last_states(after) if self.sequence else after
            totals += self._totals(loss_sum, batch)
        self.engine.train()
        all_reduce_sum(totals)
        loss = (totals[0] / totals[1]).item()
        self.evaluation_due = False
        if self.metrics:
            self.metrics.log_evaluation(self.step, {"loss": loss, "perplexity": math.exp(min(loss, 700)), "tokens": self.tokens})
        return loss

    def save(self) -> None:
        """Write a checkpoint of this moment and wait for it. Raises UserError."""
        self._finish_writing()
        self._finish_writing(self._begin_to_write(None), must=True)

    def _save_if_due(self, ends: bool) -> None:
        """Take care of checkpoints at a step's end; when the run `ends`, all there is to save is on the disk afterwards."""
        if self.written or ends:
            self._finish_writing()
        if self.saved_at == self.step or self.step == 0 or not (ends or self.step % self.config.checkpoint.every == 0):
            return
        if self.bad_steps:
            return  # not while the loss is not finite: such checkpoints would push out the good ones
        watchdog.beat(f"saving step {self.step}")
        if ends:
            return self.save()
        self._finish_writing()
        try:
            self.writing = self._begin_to_write(self.copies if self.config.checkpoint.background else None)
        except UserError as error:
            self._warn_not_saved(error)
        if not self.config.checkpoint.background:
            self._finish_writing()

    def _begin_to_write(self, copies: dict[str, torch.Tensor] | None) -> store.Save:
        state = {
            "step": self.step, "tokens": self.tokens, "code": self.code, "skipped": self.skipped, "rollbacks": self.rollbacks,
            "losses": list(self.spikes.losses), "evaluation_due": self.evaluation_due,
            "data": self.stream.state(self._next_sample(), self.digest),
            "wandb_id": broadcast_object(self.metrics.wandb_id if self.metrics else None),
        }
        return store.begin(self.engine, self.checkpoints, self.step, state, self.texts, copies)

    def _finish_writing(self, writing: store.Save | None = None, must: bool = False) -> None:
        """Publish what is being written. A full disk is no reason to stop, unless it `must` be saved: the older checkpoints are
        whole, and there may be room the next time."""
        writing, self.writing = writing or self.writing, None
        if writing is None:
            return
        keep = self.config.checkpoint
        try:
            saved = writing.finish(keep.keep_last, keep.keep_every)
        except UserError as error:
            if must:
                raise
            return self._warn_not_saved(error)
        self.saved_at = store.step_of(saved.path)
        if self.metrics:
            self.metrics.log_checkpoint(self.saved_at, {
                "bytes": saved.bytes, "seconds": saved.seconds, "stall_seconds": saved.stall_seconds})

    def _warn_not_saved(self, error: UserError) -> None:
        if self.processes.rank == 0:
            print(f"warning: a checkpoint is not saved, training goes on: {error}", file=sys.stderr, flush=True)

    def _roll_back(self, loss: float) -> None:
        """After a loss spike: the last checkpoint again, without the samples from there to here."""
        self._finish_writing()
        path = on_rank_zero(lambda: newest_checkpoint(self.checkpoints)[0])
        if path is not None and store.step_of(path) < self.samples.stages[-1].step:
            path = None  # samples left out from there on would move the stages' ends
        if path is None or self.rollbacks >= self.config.training.max_rollbacks:
            if self.processes.rank == 0:
                why = f"training.max_rollbacks={self.rollbacks} are used up"
                if path is None:
                    why = "there is no checkpoint" + " since training.stages ended" * bool(self.config.training.stages)
                print(f"warning: step {self.step}: loss {loss:.4f} is a spike; {why}", file=sys.stderr, flush=True)
            return
        spike, score, to, rollbacks = self.step, self.spikes.score(loss), self._next_sample(), self.rollbacks + 1
        self._take_up(path)
        skips = self._next_sample(), to
        self.skipped, self.rollbacks = to - self.samples.samples(self.step), rollbacks
        if self.metrics:
            self.metrics.close()
            self.metrics = self._open_metrics()  # lines of the steps taken back move out
            self.metrics.log_rollback(self.step, {
                "spike_step": spike, "loss": loss, "z_score": score, "skips": skips, "rollbacks": rollbacks})

    def _agree_to_stop(self) -> bool:
        """Whether any rank was asked to end; the same on all."""
        asked = torch.tensor(float(signals.received() is not None), device=self.processes.device)
        self.stopping = all_reduce_sum(asked).item() > 0
        return self.stopping

    def _loss(self, batch: DeviceBatch) -> torch.Tensor:
        loss_sum, _ = self.engine(batch.tokens, batch.documents, batch.labels)
        return loss_sum

    def _totals(self, loss_sum: torch.Tensor, batch: DeviceBatch) -> torch.Tensor:
        """(2,) float64: the loss summed over labelled tokens, and their number."""
        return torch.stack([loss_sum.detach().double(), (batch.labels >= 0).sum().double()])

    def _begin_step(self) -> int:
        """Tell DeepSpeed this step's batch, which `training.stages` may change; the number of passes."""
        stage, world_size = self.samples.stage(self.step), self.processes.world_size
        accumulation = self.config.grad_accumulation(world_size, self.step)
        rows = self.config.training.micro_batch * stage.parts
        if (rows, accumulation) != (self.engine.train_micro_batch_size_per_gpu(), self.engine.gradient_accumulation_steps()):
            self.engine.set_train_micro_batch_size(rows)
            self.engine.set_train_batch_size(stage.global_batch)
            self.engine.micro_steps = 0  # it steps where these are a multiple of the passes
        return accumulation

    def _agree_on_skipped(self, tokens: int) -> None:
        """All ranks leave out what any of them found damaged, from the next step on."""
        known = self.stream.skipped
        for shards in on_every_rank(lambda: known):
            self.stream.skip(shards)
        self.stream.tokens_skipped += tokens
        if self.stream.skipped != known:
            self.ahead = None  # it may hold what is left out now

    def _batch(self, step: int, micro_step: int) -> DeviceBatch:
        """This rank's micro-batch of a pass."""
        ahead, self.ahead = self.ahead, None
        if ahead and ahead[0] == (step, micro_step):
            return ahead[1]
        rows = self.config.training.micro_batch * self.samples.stage(step).parts
        return DeviceBatch.of(self.stream.batch(self._first_sample(step, micro_step), rows), self.processes.device, self.sequence)

    def _fetch_ahead(self, micro_step: int, accumulation: int) -> None:
        """Get the batch after this one while the device is at work. Not past the budget, and not for the CPU: it is at work."""
        following = (self.step, micro_step + 1) if micro_step + 1 < accumulation else (self.step + 1, 0)
        if self.processes.device.type == "cuda" and following[0] < self.config.total_steps:
            self.ahead = following, self._batch(*following)

    def _first_sample(self, step: int, micro_step: int) -> int:
        stage, micro_batch = self.samples.stage(step), self.config.training.micro_batch
        first = first_sample(stage, micro_batch, self.replicas, self.replica, step, micro_step)
        return self.skipped + first

    def _next_sample(self) -> int:
        """The first sample of the next step."""
        return self.samples.samples(self.step) + self.skipped

    def _samples_at_fault(self, losses: list[torch.Tensor]) -> list[tuple[int, int]]:
        """[first, last) of the passes of this step, on any rank, whose loss is not finite; of all, if only the gradient is not.
        All ranks together."""
        stage = self.samples.stage(self.step)
        firsts = [self._first_sample(self.step, i) for i, loss in enumerate(losses) if not loss.isfinite()]
        found = [first for rank in on_every_rank(lambda: firsts) for first in rank]
        if not found:
            return [(self._next_sample(), self._next_sample() + stage.global_batch)]
        return badsteps.merged([(first, first + self.config.training.micro_batch * stage.parts) for first in found])

    def _begin_record(self) -> None:
        folder = self.config.run_folder
        try:
            write_atomically(folder / "config.yaml", self.texts["config.yaml"].encode())  # the one that is there stays whole
            self.metrics = self._open_metrics()
        except OSError as error:
            raise UserError(f"{error.filename or folder}: cannot be written ({error.strerror}); free space there or set run.folder "
                            "to another disk") from None

    def _open_metrics(self) -> Metrics:
        config, yaml = self.config, self.texts["config.yaml"]
        return Metrics(config.run_folder, config.logging, config.total_steps, self.step, yaml, self.wandb_id)

    def _log(self, metrics: dict[str, float]) -> None:
        if self.metrics:
            self.metrics.log(self.step, metrics)
