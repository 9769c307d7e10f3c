"""DeepSpeed's ZeRO: shards optimizer state (1), also gradients (2), also weights and averages (3).

DeepSpeed trains; its state goes in and out one tensor at a time, as DTensors of the usual names and
shapes, so that checkpoints are the same as those of any other strategy.
"""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn import Parameter

from ddpm_engine.config import RunConfig
from ddpm_engine.errors import UserError
from ddpm_engine.networks.base import Network
from ddpm_engine.networks.build import build_network
from ddpm_engine.objectives.base import Network as Predict
from ddpm_engine.runtime import autocast_forward
from ddpm_engine.training.ema import decays, move_towards
from ddpm_engine.training.optimizer import make_optimizer
from ddpm_engine.training.strategies.fsdp import (
    make_contiguous,
    shard_network,
    sharded_weights,
)
from ddpm_engine.training.strategies.loss_scale import LossScale
from ddpm_engine.training.strategies.strategy import State

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Zero:
    """What ZeRO-1, 2 and 3 share.

    Weights stay float32 and autocast sets the precision, as in other strategies: a rank's share of
    weights, gradients and moments takes 16 bytes per parameter, as much as half-precision weights
    with a float32 copy. The engine manages the loss scale; to DeepSpeed it is a constant.

    DeepSpeed's own step reads the device: the host waits for the gradients of every step.

    Args:
        model: network on its device, the same on every rank.
        config: the run.
        accelerator: started, without DeepSpeed's plug-in.
        mesh: one-dimensional mesh of all processes.
        deepspeed_config: content of a DeepSpeed configuration file.

    Raises:
        UserError: DeepSpeed cannot be imported.
    """

    capturable = False

    def __init__(
        self,
        model: Network,
        config: RunConfig,
        accelerator: Accelerator,
        mesh: DeviceMesh,
        deepspeed_config: dict[str, Any],
    ) -> None:
        training, self._device = config.training, accelerator.device
        deepspeed = _import_deepspeed(self._device)
        stage = deepspeed_config["zero_optimization"]["stage"]
        # DeepSpeed flattens weights, which must mean the same on all ranks.
        make_contiguous(model)
        if stage == 3:
            model.separate_blocks()
        autocast_forward(model, training.precision, self._device)
        optimizer = make_optimizer(model, config.optimizer)
        for group in optimizer.param_groups:
            group["lr"] = 0.0  # ZeRO-3 takes a step on zero gradients to allocate its state
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config={
                **deepspeed_config,
                "train_micro_batch_size_per_gpu": training.batch_size
                // (accelerator.num_processes * training.accumulation),
                "gradient_accumulation_steps": training.accumulation,
                "gradient_clipping": config.optimizer.clip_norm,
                "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW also runs on CPUs
            },
        )
        if self._engine.zero_optimization_stage() != stage:
            raise RuntimeError(
                f"ZeRO-{stage} was asked for, but DeepSpeed runs stage "
                f"{self._engine.zero_optimization_stage()}"
            )
        self.name = f"DeepSpeed ZeRO-{stage}"
        self.model = model
        self._mesh = mesh
        self.loss_scale = LossScale(self._device) if training.precision == "fp16" else None
        self._begin_optimizer_state()

    @property
    def network(self) -> Predict:
        """See `Strategy`; DeepSpeed's engine must be what is called."""
        engine: Predict = self._engine
        return engine

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """See `Strategy`."""
        if self.loss_scale is not None:
            # DeepSpeed multiplies the loss by it and divides the gradients in its step.
            self._engine.optimizer.loss_scale = float(self.loss_scale.value)
        yield
        if not last:
            self._engine.step()  # counts the micro-batch

    def backward(self, loss: Tensor) -> None:
        """See `Strategy`."""
        self._engine.backward(loss)

    def step(self, learning_rate: Tensor, ema_weights: Tensor, skip: Tensor) -> Tensor:
        """See `Strategy`; DeepSpeed reads the device, and so does this.

        Raises:
            ValueError: `skip` is not zero, which DeepSpeed cannot do.
        """
        if bool(skip):
            raise ValueError("DeepSpeed cannot skip a step")
        for group in self._engine.optimizer.param_groups:
            group["lr"] = float(learning_rate)
        self._engine.step()  # skips by itself if a gradient is not finite
        overflow: bool = self._engine.optimizer.overflow
        norm = torch.tensor(
            float("inf") if overflow else float(self._engine.get_global_grad_norm()),
            device=self._device,
        )
        if self.loss_scale is not None:
            self.loss_scale.update(norm.isfinite(), skip)
        if not overflow:
            self._move_averages(ema_weights)
        return norm

    def state(self) -> State:
        """See `Strategy`; moments and everything else that is sharded are copies."""
        step = next(iter(self._flat_states()))["step"]
        optimizer: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            for moment in _MOMENTS:
                optimizer[f"state.{name}.{moment}"] = self._moment(parameter, moment)
            optimizer[f"state.{name}.step"] = step.clone()
        return {"model": self._weights(), **self.averages(), "optimizer": optimizer}

    def load(self, state: State) -> None:
        """See `Strategy`."""
        optimizer = state["optimizer"]
        for name, parameter in self.model.named_parameters():
            self._set_weight(parameter, state["model"][name])
            for moment in _MOMENTS:
                self._set_moment(parameter, moment, optimizer[f"state.{name}.{moment}"])
        for flat in self._flat_states():
            flat["step"].copy_(optimizer[f"state.{name}.step"])
        self._set_averages(state)

    def close(self) -> None:
        """See `Strategy`."""
        # As in `Replicated`: gloo's threads must not outlive the interpreter.
        self._engine.destroy()
        self._engine = None
        gc.collect()

    def _flat_states(self) -> Iterator[dict[str, Tensor]]:
        """The state of torch's AdamW, which sees this rank's partitions as flat parameters."""
        states: dict[Any, dict[str, Tensor]] = self._engine.optimizer.optimizer.state
        yield from states.values()

    def _begin_optimizer_state(self) -> None:
        """Create the optimizer's state, all zero, so that a checkpoint can be loaded into it."""
        adam = self._engine.optimizer.optimizer
        for flat in self._flat_parameters():
            state = adam.state[flat]
            for moment in _MOMENTS:
                state.setdefault(moment, torch.zeros_like(flat))
            state["step"] = torch.zeros((), device=flat.device)

    def _flat_parameters(self) -> list[Tensor]:
        """This rank's partitions, as torch's AdamW sees them."""
        groups = self._engine.optimizer.optimizer.param_groups
        return [flat for group in groups for flat in group["params"]]

    def _sharded(self, whole: Tensor) -> DTensor:
        """This rank's rows of a tensor that all ranks hold."""
        return distribute_tensor(whole, self._mesh, [Shard(0)], src_data_rank=None)

    def _move_averages(self, weights: Tensor) -> None:
        raise NotImplementedError

    def _weights(self) -> dict[str, Tensor]:
        raise NotImplementedError

    def averages(self) -> State:
        """See `Strategy`."""
        raise NotImplementedError

    def _moment(self, parameter: Parameter, moment: str) -> DTensor:
        raise NotImplementedError

    def _set_weight(self, parameter: Parameter, value: Tensor) -> None:
        raise NotImplementedError

    def _set_averages(self, state: State) -> None:
        raise NotImplementedError

    def _set_moment(self, parameter: Parameter, moment: str, value: DTensor) -> None:
        raise NotImplementedError


class Zero12(Zero):
    """ZeRO-1 and ZeRO-2: every rank holds all weights and all of their averages."""

    def __init__(self, model: Network, config: RunConfig, *arguments: Any) -> None:
        # Copied before DeepSpeed changes the model.
        self._networks = {
            name: copy.deepcopy(model).eval().requires_grad_(False)
            for name in decays(config.training)
        }
        super().__init__(model, config, *arguments)

    @torch.no_grad()
    def _move_averages(self, weights: Tensor) -> None:
        values = [p.detach() for p in self.model.parameters()]
        for network, weight in zip(self._networks.values(), weights.unbind(), strict=True):
            move_towards(list(network.parameters()), values, weight.to(values[0].dtype))
            for ours, theirs in zip(network.buffers(), self.model.buffers(), strict=True):
                ours.copy_(theirs)

    @contextmanager
    def averaged(self) -> Iterator[Network]:
        """See `Strategy`."""
        yield self._networks["ema"]

    def averages(self) -> State:
        """See `Strategy`."""
        return {name: dict(network.named_parameters()) for name, network in self._networks.items()}

    def _begin_optimizer_state(self) -> None:
        super()._begin_optimizer_state()
        # DeepSpeed maps parameters to the flat state only after its first step.
        self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _weights(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.model.named_parameters()}

    def _moment(self, parameter: Parameter, moment: str) -> DTensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        return self._sharded(safe_get_full_optimizer_state(parameter, moment))

    def _set_weight(self, parameter: Parameter, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param

        # The weights were loaded in place; DeepSpeed keeps another copy for the optimizer.
        safe_set_full_fp32_param(parameter, value)

    def _set_averages(self, state: State) -> None:
        """They were loaded in place."""

    def _set_moment(self, parameter: Parameter, moment: str, value: DTensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        safe_set_full_optimizer_state(parameter, value.full_tensor(), moment)


class Zero3(Zero):
    """ZeRO-3: each rank holds and averages a flat shard of every weight."""

    def __init__(self, model: Network, config: RunConfig, *arguments: Any) -> None:
        super().__init__(model, config, *arguments)
        self._average = {
            name: [p.clone() for p in self._pieces()] for name in decays(config.training)
        }

    def _move_averages(self, weights: Tensor) -> None:
        pieces = self._pieces()
        for average, weight in zip(self._average.values(), weights.unbind(), strict=True):
            move_towards(average, pieces, weight.to(pieces[0]))

    @contextmanager
    def averaged(self) -> Iterator[Network]:
        """See `Strategy`; a temporary network, sharded by FSDP2."""
        network = build_network(self.model.config).to(self._device).eval().requires_grad_(False)
        shard_network(network, self._mesh)
        ours = sharded_weights(network)
        for name, value in self._whole_average("ema").items():
            ours[name].to_local().copy_(value.to_local())
        yield network

    def averages(self) -> State:
        """See `Strategy`; copies."""
        return {name: self._whole_average(name) for name in self._average}

    def _flat_parameters(self) -> list[Tensor]:
        # AdamW holds them during its step only.
        return list(self._engine.optimizer.fp32_partitioned_groups_flat)

    def _pieces(self) -> list[Tensor]:
        """This rank's flat shard of every weight, padded to the length of the others."""
        return [p.ds_tensor.data for p in self.model.parameters()]  # type: ignore[attr-defined]

    def _whole(self, piece: Tensor, parameter: Parameter) -> Tensor:
        """Gather the shards of all ranks of something shaped like a parameter."""
        piece = piece.to(self._device).contiguous()
        flat = piece.new_empty(len(piece) * dist.get_world_size())
        dist.all_gather_into_tensor(flat, piece)
        shape = parameter.ds_shape  # type: ignore[attr-defined]
        return flat[: shape.numel()].view(shape)

    def _piece(self, value: DTensor, parameter: Parameter) -> Tensor:
        """Cut this rank's shard from such a tensor."""
        length = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        flat = value.full_tensor().flatten()
        flat = torch.nn.functional.pad(flat, (0, length * dist.get_world_size() - len(flat)))
        return flat[length * dist.get_rank() :][:length]

    def _weights(self) -> dict[str, Tensor]:
        return {
            name: self._sharded(self._whole(p.ds_tensor.data, p))  # type: ignore[attr-defined]
            for name, p in self.model.named_parameters()
        }

    def _whole_average(self, average: str) -> dict[str, DTensor]:
        pieces = zip(self.model.named_parameters(), self._average[average], strict=True)
        return {name: self._sharded(self._whole(piece, p)) for (name, p), piece in pieces}

    def _moment(self, parameter: Parameter, moment: str) -> DTensor:
        from deepspeed.utils import safe_get_local_optimizer_state

        return self._sharded(
            self._whole(safe_get_local_optimizer_state(parameter, moment), parameter)
        )

    def _set_weight(self, parameter: Parameter, value: Any) -> None:
        from deepspeed.utils import safe_set_local_fp32_param

        piece = self._piece(value, parameter)
        parameter.ds_tensor.data.copy_(piece)  # type: ignore[attr-defined]
        safe_set_local_fp32_param(parameter, piece)
        if parameter.data.shape == parameter.ds_shape:  # type: ignore[attr-defined]
            parameter.data.copy_(value.full_tensor())  # small ones stay gathered

    def _set_averages(self, state: State) -> None:
        for average, pieces in self._average.items():
            for (name, parameter), piece in zip(self.model.named_parameters(), pieces, strict=True):
                piece.copy_(self._piece(state[average][name], parameter))

    def _set_moment(self, parameter: Parameter, moment: str, value: DTensor) -> None:
        from deepspeed.utils import safe_set_local_optimizer_state

        safe_set_local_optimizer_state(parameter, self._piece(value, parameter), moment)


def _import_deepspeed(device: torch.device) -> Any:
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # its own detection may find another
    os.environ.setdefault("LOCAL_RANK", "0")  # required even for a single process
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            f"the launcher asks for DeepSpeed, which cannot be imported ({error}); install it by "
            "pip install 'ddpm-engine[deepspeed]', or launch with launch/accelerate/fsdp2.yaml"
        ) from None
    if device.type == "cpu":
        # It would compile shared-memory collectives for a minute or two; interrupting that leaves a
        # lock that the next start waits for.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # The process group exists; this makes DeepSpeed use it.
    deepspeed.init_distributed(dist_backend=dist.get_backend())
    return deepspeed
