"""AndersonAccelerator in the Trainer of Hugging Face transformers, as a TrainerCallback.

    python examples/hf_trainer.py

Needs transformers and Accelerate: pip install transformers accelerate.
"""

import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from lightning_stableaa import AndersonAccelerator


class AndersonTrainerCallback(TrainerCallback):
    """Accelerates the optimizer of a Trainer; options are those of ``AndersonAccelerator``.

    The safeguard evaluates the model's own loss on the last micro-batch of the step.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options

    def on_train_begin(self, args, state, control, model, optimizer, **kwargs) -> None:
        """Begins with an empty history, in a resumed run too."""
        self.accelerator = AndersonAccelerator(optimizer, **self.options)
        self.batch: dict[str, Any] = {}
        self.hook = model.register_forward_pre_hook(self._keep_batch, with_kwargs=True)

    def _keep_batch(self, model: nn.Module, inputs: tuple[Any, ...], named: dict) -> None:
        if model.training:
            self.batch = named

    def on_step_end(self, args, state, control, model, **kwargs) -> None:
        """Extrapolates where it is due, after the optimizer and its schedule have stepped."""
        batch = self.batch
        self.accelerator.step(lambda: model(**batch).loss)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Reports the outcome."""
        self.hook.remove()
        accepted, attempted = self.accelerator.accepted, self.accelerator.attempted
        print(f"accepted {accepted} of {attempted} extrapolations in {state.global_step} steps")


def examples(count: int) -> list[dict[str, Tensor]]:
    """Sequences of tokens, labelled by whether the first one is larger than the second."""
    tokens = torch.randint(0, 50, (count, 12), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": (row[0] > row[1]).long()} for row in tokens]


def main() -> None:
    """Trains a small BERT for 200 steps."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 16}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
    model = BertForSequenceClassification(BertConfig(**sizes, **layers))
    with tempfile.TemporaryDirectory() as folder:
        options = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True}
        arguments = TrainingArguments(
            folder, max_steps=200, learning_rate=1e-3, use_cpu=True, seed=0, **options
        )
        callbacks = [AndersonTrainerCallback()]
        Trainer(model, arguments, train_dataset=examples(256), callbacks=callbacks).train()


if __name__ == "__main__":
    main()
