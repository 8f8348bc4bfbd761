"""Residual reuse: on a skipped step the transformer's blocks are replaced by ``x + residual``.

The one mechanism under every whole-model cache. Embeddings and head always run; what the blocks
added the last time they ran is added again. A `Policy` says for each call whether to compute. State
is born with a video and kept by expert and by branch (diffusers' cache context), so guidance
branches never mix and an expert that takes over starts with a computed step.

Shapes: B batch, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.hooks.hooks import BaseState, ModelHook, StateManager
from torch import Tensor, nn

from baselines.policy import Call, Policy
from hsa.registry import registered
from hsa.trace import experts

_HOOK = "residual_reuse"


class _Branch(BaseState):
    def __init__(self, make_policy: Callable[[], Policy]) -> None:
        self.make_policy = make_policy
        self.reset()

    def reset(self) -> None:
        self.policy = self.make_policy()
        self.residual: Tensor | None = None
        self.call: Call | None = None
        self.reusing = False


class _Engine(ModelHook):
    """Sits on the transformer root, where diffusers hands it the cache context."""

    _is_stateful = True

    def __init__(self, make_policy: Callable[[], Policy], step: Callable[[], int]) -> None:
        super().__init__()
        self.branches = StateManager(_Branch, (make_policy,))
        self.step = step
        self.signal: Any = None
        self.branch: _Branch | None = None

    def enter(self, tokens: Tensor) -> Tensor:
        """Decide; return what the second block would see on reuse, else the tokens unchanged."""
        branch = self.branch = self.branches.get_state()
        step = self.step()
        if step == 0:
            branch.reset()
        call = Call(step, self.branches.context.name, tokens, self.signal)
        branch.reusing = not branch.policy.decide(call) and branch.residual is not None
        if branch.reusing:
            return tokens + branch.residual
        branch.call = call
        return tokens

    def leave(self, tokens: Tensor) -> None:
        branch = self.branch
        branch.residual = tokens - branch.call.tokens
        branch.policy.observe(branch.call, branch.residual)
        branch.call = None

    def tap(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.signal = output

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.branches.reset()
        self.branch = self.signal = None
        return module


class _Block(ModelHook):
    """Runs its block, or passes the tokens through while the engine reuses."""

    def __init__(self, engine: _Engine, first: bool, last: bool) -> None:
        super().__init__()
        self.engine, self.first, self.last = engine, first, last

    def new_forward(self, module: nn.Module, tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.first:
            tokens = self.engine.enter(tokens)
        if self.engine.branch.reusing:
            return tokens
        tokens = self.fn_ref.original_forward(tokens, *args, **kwargs)
        if self.last:
            self.engine.leave(tokens)
        return tokens


@contextmanager
def residual_reuse(
    pipe: DiffusionPipeline, make_policy: Callable[[], Policy], tap: str | None = None
) -> Iterator[None]:
    """Reuse residuals in every expert of the pipe as the policy says.

    Args:
        make_policy: called for each branch of each expert at the start of each video.
        tap: name of a submodule of the transformer whose output is the policy's ``call.signal``.
    """
    with ExitStack() as stack:
        for transformer in experts(pipe).values():
            engine = _Engine(make_policy, lambda: pipe.scheduler.step_index or 0)
            stack.enter_context(registered(transformer, engine, _HOOK))
            last = len(transformer.blocks) - 1
            for index, block in enumerate(transformer.blocks):
                hook = _Block(engine, first=index == 0, last=index == last)
                stack.enter_context(registered(block, hook, _HOOK))
            if tap:
                handle = transformer.get_submodule(tap).register_forward_hook(engine.tap)
                stack.callback(handle.remove)
        yield
