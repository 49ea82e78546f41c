"""The PixelBytes notebook, cell by cell: same imports, same calls.

Where the Hugging Face hub or the package `datasets` is out of reach, the set that comes with the package stands in.

    python examples/notebook.py                # a short run, under two minutes on two cores
    python examples/notebook.py --epochs 200   # as long as the original
    python examples/notebook.py --model mamba  # or seq; the original trained the attention model
"""

# The notebook's own star imports are the point of this file.
# ruff: noqa: F403, F405
from __future__ import annotations

import argparse
import urllib.request

# In [2]
from pixelbytes.dataset import *
from pixelbytes.mambabys import *
from pixelbytes.tokenizer import *
from pixelbytes.train import *

EPOCHS = 2  # the original: 200
ITEMS = 120  # of the stand-in set; the original's has 964 rows
MINUTES = 1.2  # whatever the epochs, training stops after this; the original had no limit
HUB = "https://huggingface.co/api/datasets/ffurfaro/PixelBytes-Pokemon"

arguments = argparse.ArgumentParser(description="The PixelBytes notebook.")
arguments.add_argument("--epochs", type=int, default=None, help=f"default {EPOCHS}, at most {MINUTES} minutes")
arguments.add_argument("--items", type=int, default=ITEMS, help=f"of the stand-in set (default {ITEMS})")
arguments.add_argument("--model", choices=("attention", "seq", "mamba"), default="attention")
arguments.add_argument("--save-dir", default="model_checkpoints")
arguments = arguments.parse_args()


class StandIn:
    """What the cells below ask of `datasets`: `["train"].train_test_split(...)`, then `["train"]["pixelbyte"]`."""

    def __init__(self, rows):
        self.rows = rows

    def __getitem__(self, name):
        return self.rows if name == "pixelbyte" else self

    def train_test_split(self, test_size):
        train, test = split_rows(self.rows, (1 - test_size, test_size))
        return {"train": StandIn(train), "test": StandIn(test)}


def load_dataset(name):
    """`datasets.load_dataset`, or within seconds the embedded set."""
    try:
        from datasets import load_dataset as load_from_hub

        urllib.request.urlopen(HUB, timeout=3).close()
        return load_from_hub(name)
    except (ImportError, OSError) as error:
        print(f"{name} is out of reach ({error}): the embedded OpenMoji set stands in")
        return StandIn(load_embedded(PixelBytesTokenizer(), limit=arguments.items).rows)


# In [3]
hf_dataset = load_dataset("ffurfaro/PixelBytes-Pokemon")
ds = hf_dataset["train"].train_test_split(test_size=0.1)

train_dataset = PxByDataset(ds["train"]["pixelbyte"], seq_length=256, stride=32)
test_dataset = PxByDataset(ds["test"]["pixelbyte"], seq_length=256, stride=32)

pixelbyte = PixelBytesTokenizer()

# In [7]
vocab_size = len(pixelbyte.vocab)
embedding_dim = 16
hidden_dim = 64
# Mamba
d_model = 64
d_state = 16
n_layers = 8
config = MambaConfig(dim=d_model, d_state=d_state, depth=n_layers, vocab_size=vocab_size)
# choose model (simple, attention, mamba)
if arguments.model == "seq":
    model = SimpleSeqModel(vocab_size, embedding_dim, hidden_dim)
elif arguments.model == "attention":
    model = SimpleAttentionModel(vocab_size, embedding_dim, hidden_dim)
else:
    model = BysMamba(config)

# In [8]
trainer = Trainer(
    model=model,
    train_dataset=train_dataset,
    test_dataset=test_dataset,
    batch_size=32,
    learning_rate=0.001,
    num_epochs=arguments.epochs or EPOCHS,
    save_dir=arguments.save_dir,
    compile_model=False,
    model_name={"attention": "SimpleAttentionModel", "seq": "SimpleSeqModel", "mamba": "Mambabys"}[arguments.model],
    dataset_name="PixelBytes-Pokemon",
    eval_every=5,
    max_minutes=None if arguments.epochs else MINUTES,
)

trainer.train()
