"""A hidden tree model written plainly, as Einsum networks have it, with nothing of the engine.

Peharz et al., "Einsum Networks: Fast and Scalable Learning of Tractable Probabilistic Circuits",
2020: layers of `max`, `exp`, `torch.einsum` and `log` (section 3.2), and expectation maximisation
whose counts are what autograd says of the log-likelihood (section 3.5).
"""

import math

import torch


class PlainTree:
    """p(x) = sum_z start(z_r) prod move_i(z_i | z_parent) prod emit_i(x_i | z_i).

    Tables are linear: `start (M,)`, `move (D, M, M)` with a row for each state of the parent (that
    of the root is never read), `emit (D, C, M)`. They start as uniform numbers, normalised.
    """

    def __init__(self, parent, num_categories, num_latents, *, seed, dtype=torch.float32):
        self.parent = [int(p) for p in parent]
        generator = torch.Generator().manual_seed(seed)

        def table(*shape, dim):
            numbers = 0.01 + 0.98 * torch.rand(shape, generator=generator, dtype=dtype)
            return numbers / numbers.sum(dim, keepdim=True)

        size, m = len(self.parent), num_latents
        self.start = table(m, dim=0)
        self.move = table(size, m, m, dim=2)
        self.emit = table(size, num_categories, m, dim=1)
        depth = [self._depth(node) for node in range(size)]
        self.levels = [
            torch.tensor([node for node in range(size) if depth[node] == level])
            for level in range(max(depth), 0, -1)
        ]

    def _depth(self, node):
        return 0 if self.parent[node] == -1 else 1 + self._depth(self.parent[node])

    def log_prob(self, x):
        nodes = torch.arange(len(self.parent))
        below = self.emit.log()[nodes, x]  # (B, D, M)
        up = torch.tensor(self.parent)
        for level in self.levels:
            values = below[:, level]
            largest = values.amax(-1, keepdim=True)
            sums = torch.einsum("bdk,dlk->bdl", (values - largest).exp(), self.move[level])
            below = below.index_add(1, up[level], largest + sums.log())
        root = below[:, self.parent.index(-1)]
        largest = root.amax(-1, keepdim=True)
        return largest[:, 0] + torch.einsum("bk,k->b", (root - largest).exp(), self.start).log()

    def em_step(self, x, step_size, pseudocount, leaf_pseudocount):
        tables = [self.start, self.move, self.emit]
        for table in tables:
            table.requires_grad_()
        slopes = torch.autograd.grad(self.log_prob(x).sum(), tables)
        extra = (pseudocount, pseudocount, leaf_pseudocount[..., None])
        found = []
        for table, slope, more, dim in zip(tables, slopes, extra, (0, 2, 1), strict=True):
            table = table.detach()
            counts = table * slope + more
            counts = counts / counts.sum(dim, keepdim=True)
            found.append((1 - step_size) * table + step_size * counts)
        self.start, self.move, self.emit = found

    def fit(self, x, *, epochs, batch_size, step_size, pseudocount, leaf_pseudocount, generator):
        steps = epochs * math.ceil(len(x) / batch_size)
        step = 0
        for _ in range(epochs):
            for rows in torch.randperm(len(x), generator=generator).split(batch_size):
                share = len(rows) / len(x)
                turn = (1 + math.cos(math.pi * step / (steps - 1))) / 2
                eta = step_size[1] + (step_size[0] - step_size[1]) * turn
                self.em_step(x[rows], eta, pseudocount * share, leaf_pseudocount * share)
                step += 1

    @torch.no_grad()
    def bits_per_dim(self, x):
        return -self.log_prob(x).mean().item() / (math.log(2) * x.shape[1])
