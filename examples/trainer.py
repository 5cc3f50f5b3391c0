"""An equilibrium model in Hugging Face's Trainer: `deq_compile(model)`, then everything as ever.

The model classifies the handwritten digits of scikit-learn. Nothing is downloaded.
Needs: pip install transformers accelerate scikit-learn

    python examples/trainer.py --bf16 --csv solves.csv
"""

import argparse
import tempfile

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from transformers import Trainer, TrainingArguments

from deq_compile import deq_compile, record_solves
from deq_compile.watch import TrainerWatch


class EquilibriumClassifier(nn.Module):
    """z <- tanh(0.7 W z + U pixels), |W| = 1, 50 times from zero; a linear head.

    pixels [B, 64], labels [B] or None -> a dict: loss [] where there are labels, logits [B, 10]
    """

    def __init__(self, width=64, rounds=50):
        super().__init__()
        self.rounds = rounds
        self.inject, self.cell, self.head = nn.Linear(64, width), nn.Linear(width, width), nn.Linear(width, 10)
        spectral_norm(self.cell)

    def forward(self, pixels, labels=None):
        injected = self.inject(pixels)
        weight = 0.7 * self.cell.weight  # read once: its norm is estimated anew at each reading
        z = torch.zeros_like(injected)
        for _ in range(self.rounds):
            z = torch.tanh(F.linear(z, weight, self.cell.bias) + injected)
        logits = self.head(z)
        found = {"logits": logits}
        return found if labels is None else {"loss": F.cross_entropy(logits, labels), **found}


def digits():
    """1,437 samples for training and 360 for evaluation, as dicts: pixels [64] in 0 to 1, labels []."""
    data = load_digits()
    pixels = torch.tensor(data.data, dtype=torch.float32) / 16
    samples = [{"pixels": x, "labels": int(y)} for x, y in zip(pixels, data.target, strict=True)]
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0)).tolist()
    return [samples[i] for i in order[:1437]], [samples[i] for i in order[1437:]]


def accuracy(prediction):
    """What the Trainer asks for after an evaluation."""
    return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


def main(steps=150, bf16=False, csv=None, options=None):
    """Train; the metrics of the evaluation, and the records of all solves."""
    torch.manual_seed(0)
    train, test = digits()
    model = deq_compile(EquilibriumClassifier(), **(options or {}))  # compiled in place: the Trainer still sees its signature
    with tempfile.TemporaryDirectory() as folder, record_solves() as solves:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=64,
            per_device_eval_batch_size=360,
            learning_rate=5e-3,
            bf16=bf16,
            dataloader_drop_last=True,  # batches of one size: one compilation
            use_cpu=not torch.cuda.is_available(),
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
        )
        callbacks = [TrainerWatch(csv, every=10)] if csv else []
        trainer = Trainer(model, arguments, train_dataset=train, eval_dataset=test, compute_metrics=accuracy, callbacks=callbacks)
        trainer.train()
        return trainer.evaluate(), solves


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="training steps (default %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="under autocast to bfloat16")
    parser.add_argument("--csv", help="write there what the solves did")
    metrics, solves = main(**vars(parser.parse_args()))
    trained = [solve for solve in solves if solve.vjps is not None]
    mean = sum(solve.iterations for solve in trained) / len(trained)
    print(f"accuracy {metrics['eval_accuracy']:.1%}; {mean:.1f} iterations a solve, in place of 50")
