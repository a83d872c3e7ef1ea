"""transformers: a small BERT with dropout, trained on mini-batches that are BatchEncodings."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader
from transformers import BatchEncoding, BertConfig, BertForSequenceClassification

PACKAGE, MODEL = "transformers", "BERT, 2 layers, `BatchEncoding`, mini-batches"


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        sizes: dict[str, Any] = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "max_position_embeddings": 16,
        }
        layers: dict[str, Any] = {
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "vocab_size": 50,
        }
        self.model = BertForSequenceClassification(BertConfig(**sizes, **layers))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.model(**batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def collate(rows: Any) -> BatchEncoding:
    tokens = torch.stack(rows)
    return BatchEncoding({"input_ids": tokens, "labels": (tokens[:, 0] > tokens[:, 1]).long()})


def train(callbacks: list[Any], options: dict[str, Any]) -> Any:
    tokens = torch.randint(0, 50, (256, 12), generator=torch.Generator().manual_seed(0))
    module = Classifier()
    trainer = Trainer(max_epochs=13, callbacks=callbacks, **options)
    data: Any = list(tokens)
    trainer.fit(module, DataLoader(data, batch_size=16, collate_fn=collate))
    return module
