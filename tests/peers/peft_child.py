"""The logits of DIR/model with DIR/adapters by PEFT, in a process of its own: no jax here.

python peft_child.py DIR
"""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

folder = Path(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
model = PeftModel.from_pretrained(model, folder / "adapters").eval()
with torch.inference_mode():
    np.save(folder / "logits.npy", model(torch.from_numpy(np.load(folder / "tokens.npy"))).logits.numpy())
