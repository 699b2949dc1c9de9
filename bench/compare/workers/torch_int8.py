"""A linear layer whose weights and inputs are 8-bit, through oneDNN: one scale per output row and one per tensor of inputs, chosen at each call."""

import torch


class Int8(torch.nn.Module):
    def __init__(self, w, rows, bias=None):
        """rows: how many rows x will have. With one, weights alone are int8 (aten::_weight_int8pack_mm), and there is no bias."""
        super().__init__()
        scale = w.float().abs().amax(1) / 127
        q = (w.float() / scale[:, None]).round().clamp(-127, 127).to(torch.int8)
        self.register_buffer("scale", scale)
        self.register_buffer("zeros", torch.zeros(len(w), dtype=torch.int64))
        self.register_buffer("bias", bias)
        self.register_buffer("narrow", q if rows == 1 else None)
        self.register_buffer("packed", torch.ops.onednn.qlinear_prepack(q, [rows, w.shape[1]]) if rows > 1 else None)

    def forward(self, x):
        if self.narrow is not None:
            return torch.ops.aten._weight_int8pack_mm(x.view(-1, x.shape[-1]), self.narrow, self.scale.to(torch.bfloat16))
        step = x.abs().amax().float() / 127
        q = (x.float() / step).round().to(torch.int8)
        return torch.ops.onednn.qlinear_pointwise.tensor(q, step.view(1), torch.zeros(1, dtype=torch.int64), self.packed, self.scale, self.zeros, self.bias, 1.0, 0,
                                                         torch.bfloat16, "none", [], "")
