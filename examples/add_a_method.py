"""A complete new method outside the package: train an r x r core between frozen singular vectors.

delta = U R Vh with the leading singular vectors U, Vh of the weight frozen and R (r, r) trained from 0: r * r numbers
per weight. In the spirit of LoRA-XS (arXiv 2405.17604). Run: python examples/add_a_method.py
"""

import tempfile
from dataclasses import dataclass

import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from spectral_peft import SpectralConfig, SpectralUpdate, register


class Core(SpectralUpdate):
    trained = ("R",)
    is_linear = True  # U R Vh is linear in R: adapters of one start can be added up by it

    def __init__(self, size):
        super().__init__(size)
        m, n, r = size[:3]
        self.U = size.factor(m, r)
        self.R = size.factor(r, r)
        self.Vh = size.factor(r, n)

    @torch.no_grad()
    def start_(self, factors):
        self.U.weight.copy_(factors.U)
        self.Vh.weight.copy_(factors.Vh)
        self.R.weight.zero_()

    def forward(self, x):
        return self.U(self.R(self.Vh(self.dropout(x))))

    def thin_change(self):
        return self.U.weight @ self.R.weight, self.Vh.weight


@register
@dataclass
class CoreConfig(SpectralConfig):
    method = "core"

    def build(self, size):
        return Core(size)


def tiny_llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=128, **sizes)).eval()


def main():
    model = get_peft_model(tiny_llama(), CoreConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.print_trainable_parameters()

    tokens = torch.randint(0, 128, (4, 16))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(10):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.4f}")

    with tempfile.TemporaryDirectory() as folder:
        model.eval().save_pretrained(folder)
        reloaded = PeftModel.from_pretrained(tiny_llama(), folder).eval()
    with torch.no_grad():
        same = torch.equal(reloaded(input_ids=tokens).logits, model(input_ids=tokens).logits)
        with model.disable_adapter():
            untouched = torch.equal(model(input_ids=tokens).logits, tiny_llama()(input_ids=tokens).logits)
    print(f"reloaded: {'the same' if same else 'other'} logits")
    print(f"disabled: {'the same' if untouched else 'other'} logits as the base model")
    return same and untouched


if __name__ == "__main__":
    main()
