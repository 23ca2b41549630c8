"AdaHessian written out from the paper's algorithm 1, without fastai and without this package: what the optimizer is compared with"
import torch
from torch.autograd import grad


def hessian_times(loss, params, zs):
    "Hz for each of `params`, from the gradient of gᵀz"
    gs = grad(loss, params, create_graph=True)
    gz = sum((g*z).sum() for g,z in zip(gs,zs))
    return [g.detach() for g in gs],list(grad(gz, params))


def spatial_average(d, block_length):
    "Equation 10 as the published code has it: means of |d| over kernels, and over runs of a flattened matrix"
    d = d.abs() if d.dim()>1 else d
    if d.dim()==2 and block_length>1:
        flat,out = d.flatten(),torch.empty(d.numel(), dtype=d.dtype)
        for i in range(0, d.numel(), block_length): out[i:i+block_length] = flat[i:i+block_length].mean()
        return out.view(d.shape)
    if d.dim()>2:
        out = torch.empty_like(d)
        for i in range(d.shape[0]):
            for j in range(d.shape[1]): out[i,j] = d[i,j].mean()
        return out
    return d


class Twin:
    "AdaHessian on groups of parameters, each a dict of `params` and hyperparameters"
    def __init__(self, groups, draw, block_length=32, update_each=1, n_samples=1, decouple_wd=True):
        self.groups,self.draw,self.block_length = groups,draw,block_length
        self.update_each,self.n_samples,self.decouple_wd = update_each,n_samples,decouple_wd
        self.params = [p for g in groups for p in g['params']]
        self.m = [torch.zeros_like(p) for p in self.params]
        self.v = [torch.zeros_like(p) for p in self.params]
        self.t,self.h = 0,0

    def curvature(self, losses):
        "Mean gradient and mean z⊙Hz over `losses`, callables that are evaluated one after the other"
        g = [torch.zeros_like(p) for p in self.params]
        d = [torch.zeros_like(p) for p in self.params]
        for loss in losses:
            for s in range(self.n_samples):
                zs = [self.draw(p, None) for p in self.params]
                gs,hz = hessian_times(loss(), self.params, zs)
                for i in range(len(g)):
                    if s==0: g[i] += gs[i]/len(losses)
                    d[i] += zs[i]*hz[i]/len(losses)/self.n_samples
        return g,d

    def step(self, losses, **hypers):
        "One step on the mean of `losses`; `hypers` override those of all groups"
        if self.t%self.update_each==0:
            g,d = self.curvature(losses)
            self.h += 1
        else: g,d = [sum(o)/len(losses) for o in zip(*[grad(loss(), self.params) for loss in losses])],None
        self.t += 1
        i = 0
        for group in self.groups:
            hp = {**group, **hypers}
            for p in group['params']:
                self.move(i, p, g[i], None if d is None else d[i], hp)
                i += 1

    def move(self, i, p, g, d, hp):
        b1,b2 = hp['mom'],hp['sqr_mom']
        if self.decouple_wd: p.data = p.data - hp['lr']*hp['wd']*p.data
        else: g = g + hp['wd']*p.data
        self.m[i] = b1*self.m[i] + (1-b1)*g
        if d is not None: self.v[i] = b2*self.v[i] + (1-b2)*spatial_average(d, self.block_length)**2
        m_hat = self.m[i]/(1-b1**self.t)
        v_hat = self.v[i]/(1-b2**self.h)
        p.data = p.data - hp['lr']*m_hat/(torch.sqrt(v_hat)**hp['hessian_power'] + hp['eps'])
