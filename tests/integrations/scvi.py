"""scvi-tools: a variational autoencoder of counts; the weight of its KL term grows."""

from typing import Any

import scvi

PACKAGE, MODEL = "scvi-tools", "SCVI, synthetic counts, mini-batches, KL warm-up"


def train(callbacks: list[Any], options: dict[str, Any]) -> Any:
    scvi.settings.seed = 0  # which splits the data
    counts = scvi.data.synthetic_iid()
    scvi.model.SCVI.setup_anndata(counts, batch_key="batch")
    model = scvi.model.SCVI(counts, n_hidden=32, n_latent=5)
    plan = {"n_epochs_kl_warmup": 20}
    model.train(max_epochs=50, train_size=1.0, callbacks=callbacks, plan_kwargs=plan, **options)
    return model.module
