"""A training run that can be stopped and goes on: every so many steps, and when it is told to stop, all that it needs is saved.

One piece of code for the solver, the verifier and PPO. What a step holds: weights, the optimizer's state, random state, and the facts
that the trainer gives: counters, positions, controllers.
"""

import ctypes
import os
import platform
import signal
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Callable

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from src.checkpoint.files import read_json
from src.checkpoint.manifest import MANIFEST, sync
from src.checkpoint.steps import FINISHED, Steps, is_step, list_steps, open_step
from src.data.rows import write_json
from src.errors import Stopped, UserError
from src.generation.journal import fingerprint
from src.logs import RunLog
from src.models.layout import TensorSpec
from src.models.transformer import Transformer
from src.parallel.setup import Parallel, agreed
from src.trainer.optimizer import Optimizer
from src.trainer.state import SavedModel, counters_of, file_of, restore, tensors_of

Part = tuple[Callable[[], Any], Callable[[Any], None]]
SECOND_SIGNAL_S = 3.0
PR_SET_PDEATHSIG = 1  # linux/prctl.h

# Flags that change where, how fast or how visibly a run trains, not what it learns.
FREE = {
    *("log_dir", "timeout", "save_every", "keep", "resume", "profile", "log_samples", "dump_rollouts", "eval_batch_size"),
    *("model_parallel_size", "rollout_model_parallel_size", "critic_model_parallel_size", "reward_model_parallel_size"),
    *("zero", "offload", "update", "kv_cache_gb", "rollout_batch_size", "max_batch_size", "accumulation_steps"),
    *("max_tokens_per_batch", "checkpoint_activations", "compile"),
}


def check_resume(resume: str) -> None:
    """Raise UserError when --resume names what is no saved step."""
    path = Path(resume)
    if resume not in ("auto", "none") and not (is_step(path) and (path / MANIFEST).is_file()):
        raise UserError(f"--resume {resume}: is no saved step; they are called step-… and lie in SAVE_DIR-state")


class Saving:
    """Where a run's steps are, when the next is due, and whether the run is to stop."""

    def __init__(
        self,
        settings: dict,
        save_dir: str,
        models: dict[str, tuple[Transformer, Optimizer]],
        read: list[str | None],
        parallel: Parallel,
        log: RunLog,
        parts: dict[str, Part] | None = None,
        tensors: dict[str, tuple[dict[str, Tensor], dict[str, TensorSpec]]] | None = None,
        at_work: Callable[[str], AbstractContextManager] = lambda name: nullcontext(),
    ) -> None:
        """models: name → (model, optimizer) of what is trained; read: the files and folders that the run depends on; tensors: others

        that change: name → (this rank's, how they are cut); parts: what else does, as JSON: name → (how to get it, how to set it), set
        after the tensors; at_work(name): around what needs the model, or the tensors, of that name on the device.
        """
        self.save_dir = Path(save_dir)
        self.folder, self.every, self.parallel, self.log = Path(f"{save_dir.rstrip('/')}-state"), settings["save_every"], parallel, log
        self.models, self.parts, self.tensors, self.at_work = models, parts or {}, tensors or {}, at_work
        self.resume_from = settings["resume"]
        self.settings = {name: value for name, value in settings.items() if name not in FREE}
        self.settings["files"] = fingerprint(*sorted(path for path in read if path is not None))
        self.steps = Steps(self.folder, settings["keep"], parallel)
        self.told, self.step = False, 0  # told to stop, on this rank; the last step that was taken
        self.before = signal.signal(signal.SIGTERM, self._on_signal)
        if platform.system() == "Linux" and "RANK" in os.environ:  # a launcher that dies takes its workers along
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    def _on_signal(self, *_) -> None:
        if not self.told:
            self.told, self.told_at = True, time.monotonic()
        elif time.monotonic() - self.told_at > SECOND_SIGNAL_S:  # a second one ends what hangs; a launcher's end may send two at once
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

    # --- going on ---------------------------------------------------------------------------------------------------

    def resume(self) -> int:
        """Bring back the newest step, or the one that --resume names, and return its number; 0 where there is none, or by none."""
        path = agreed(self._chosen)
        self.steps.go_back_to(None if path is None else path)
        if path is None:
            return 0
        manifest = open_step(path, self.parallel)
        agreed(lambda: self._check(path, manifest["settings"]))

        def load() -> None:
            for name, (model, optimizer) in self.models.items():
                with self.at_work(name):
                    restore(model, optimizer, SavedModel(path, name, manifest["layouts"][name]), manifest["counters"][name])
            for name, (tensors, specs) in self.tensors.items():
                saved = SavedModel(path, name, manifest["layouts"][name])
                with self.at_work(name):
                    for key, tensor in tensors.items():
                        tensor.copy_(saved.local(key, specs[key], self.parallel.mp_rank, self.parallel.mp_size))
            for name, (_, put) in self.parts.items():
                put(manifest["parts"][name])
            self._restore_random(path)

        agreed(load)
        self.step = manifest["step"]
        self.log.info(f"goes on after step {manifest['step']}, from {path}")
        return manifest["step"]

    def finished(self) -> bool:
        """Whether this very run has been done already, its model is there, and says so."""
        path = self.folder / FINISHED
        # Rank 0 looks for all: another rank may see the folder of a moment later.
        found = [self.resume_from == "auto" and path.is_file() and (self.save_dir / MANIFEST).is_file()]
        dist.broadcast_object_list(found, src=0)
        if not found[0]:
            return False
        done = agreed(lambda: read_json(path))
        agreed(lambda: self._check(path, done.get("settings")))
        self.log.info(f"this run finished after step {done.get('step')}; --resume none runs it again")
        signal.signal(signal.SIGTERM, self.before)
        return True

    def _chosen(self) -> Path | None:
        if self.resume_from == "none":
            return None
        if self.resume_from != "auto":
            return Path(self.resume_from)
        steps = list_steps(self.folder)
        # Rank 0 looks for all: another rank may see the folder of a moment later.
        chosen = [str(steps[-1]) if steps else None]
        dist.broadcast_object_list(chosen, src=0)
        return Path(chosen[0]) if chosen[0] else None

    def _check(self, path: Path, before: dict | None) -> None:
        before = before if isinstance(before, dict) else {}
        changed = sorted(name for name in before.keys() | self.settings.keys() if before.get(name) != self.settings.get(name))
        if changed:
            said = ", ".join(
                "what is read has changed" if name == "files" else f"--{name} {before.get(name)} → {self.settings.get(name)}"
                for name in changed
            )
            raise UserError(f"{path}: belongs to a run with other settings ({said}); give these, --resume none, or another folder to save to")

    # --- saving -----------------------------------------------------------------------------------------------------

    def after(self, step: int) -> None:
        """To be called after every step by all ranks. Saves when it is due; when any rank was told to stop, saves and raises Stopped."""
        self.step = step
        told = torch.tensor(float(self.told), device=self.parallel.device)
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        stop = bool(told)
        if stop or (self.every is not None and step % self.every == 0):
            self._save(step)
        if stop:
            self.steps.wait()
            signal.signal(signal.SIGTERM, self.before)
            raise Stopped(f"stopped by a signal after step {step}, which is saved; the same command goes on from there")

    def _save(self, step: int) -> None:
        p, files, counters = self.parallel, {}, {}
        for name, (model, optimizer) in self.models.items():
            with self.at_work(name):
                tensors, counters[name] = tensors_of(model, optimizer), counters_of(optimizer)
            if tensors:
                files[file_of(name, optimizer.parallel.mp_rank, optimizer.parallel.dp_rank)] = tensors
        if p.dp_rank == 0:
            for name, (tensors, _) in self.tensors.items():
                with self.at_work(name):
                    files[file_of(name, p.mp_rank, 0)] = {k: x.detach().to(device="cpu", copy=True) for k, x in tensors.items()}
        if p.mp_rank == 0:
            files[f"random.dp-{p.dp_rank:02d}.safetensors"] = self._random()
        about = {
            "settings": self.settings,
            "layouts": {
                **{name: {"mp": o.parallel.mp_size, "dp": o.parallel.dp_size} for name, (_, o) in self.models.items()},
                **{name: {"mp": p.mp_size, "dp": 1} for name in self.tensors},
            },
            "counters": counters,
            "parts": {name: get() for name, (get, _) in self.parts.items()},
        }
        self.steps.save(step, files, about)

    def _random(self) -> dict[str, Tensor]:
        states = {"cpu": torch.get_rng_state()}
        return states | ({"cuda": torch.cuda.get_rng_state()} if self.parallel.device.type == "cuda" else {})

    def _restore_random(self, path: Path) -> None:
        """Dropout's state; a data-parallel rank that there was none of keeps the one that it began with."""
        file = path / f"random.dp-{self.parallel.dp_rank:02d}.safetensors"
        if file.is_file():
            with safe_open(file, framework="pt") as states:
                torch.set_rng_state(states.get_tensor("cpu"))
                if self.parallel.device.type == "cuda" and "cuda" in states.keys():
                    torch.cuda.set_rng_state(states.get_tensor("cuda"))

    def finish(self) -> None:
        """The run is over and its models are saved."""
        self.steps.wait()
        signal.signal(signal.SIGTERM, self.before)
        if self.parallel.is_main and self.folder.is_dir():
            write_json(self.folder / FINISHED, {"step": self.step, "settings": self.settings})
            sync(self.folder)

