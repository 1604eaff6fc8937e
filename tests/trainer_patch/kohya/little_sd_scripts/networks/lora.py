"""Plain LoRA in sd-scripts' form: named modules that stand in for a model's layers."""

from safetensors.torch import save_file
from torch import nn


class LoraModule(nn.Module):
    """One layer with its pair of factors."""

    def __init__(self, layer, rank):
        super().__init__()
        self.lora_down = nn.Linear(layer.in_features, rank, bias=False)
        self.lora_up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.lora_up.weight)
        self.wrapped = [layer]

    def apply_to(self):
        layer = self.wrapped[0]
        original = layer.forward
        layer.forward = lambda x: original(x) + self.lora_up(self.lora_down(x))


class LoraNetwork(nn.Module):
    """All of them; they become its children when they are applied."""

    def __init__(self, unet, rank):
        super().__init__()
        self.unet_loras = [
            (f"lora_unet_{n}", LoraModule(m, rank)) for n, m in unet.named_children()
        ]

    def apply_to(self, text_encoder, unet, apply_text_encoder=True, apply_unet=True):
        for name, lora in self.unet_loras:
            lora.apply_to()
            self.add_module(name, lora)

    def prepare_grad_etc(self, text_encoder, unet):
        self.requires_grad_(True)

    def on_epoch_start(self, text_encoder, unet):
        self.train()

    def get_trainable_params(self):
        return self.parameters()

    def save_weights(self, file, dtype, metadata):
        tensors = {
            key: value.detach().clone().to(dtype) for key, value in self.state_dict().items()
        }
        save_file(tensors, file, metadata)


def create_network(multiplier, network_dim, network_alpha, vae, text_encoder, unet,
                   neuron_dropout=None, **kwargs):  # fmt: skip
    assert not kwargs.keys() - {"dropout"}, kwargs
    return LoraNetwork(unet, network_dim)


def create_network_from_weights(multiplier, file, vae, text_encoder, unet, weights_sd=None,
                                for_inference=False, **kwargs):  # fmt: skip
    from safetensors.torch import load_file

    weights = load_file(file)
    rank = next(len(value) for key, value in weights.items() if "lora_down" in key)
    return create_network(multiplier, rank, None, vae, text_encoder, unet, **kwargs), weights
