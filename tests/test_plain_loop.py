"A loop of one's own: schedule, accumulation, loss scale and file together do what each does alone; PyTorch's schedulers want a stand-in"
import pytest,torch,torch.nn.functional as F
from accelerate import Accelerator
from functools import partial
from torch import nn
from torch.optim import lr_scheduler
from adahessian_fastai.all import adahessian_paper as adahessian,hessian_free,sophia
from helpers_learner import HYPERS,ROUNDING,data,given,mlp,one_loss,split
from twin import Twin

def stand_in(lr=0.1): return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)


def train(model, opt, batches, schedule, scaler):
    "The loop of the tutorial, with a scheduler of PyTorch"
    for x,y in batches:
        opt.set_hyper('lr', schedule.get_last_lr())
        opt.differentiate(scaler.scale(F.cross_entropy(model(x), y)), scaler.get_scale(), len(y))
        if opt.n_batches<opt.n_acc: continue
        scaler.step(opt)
        for o in (scaler.update, schedule.optimizer.step, schedule.step, opt.zero_grad): o()


def parts(scale=2.**10, **kwargs):
    model,optimizer = mlp(),stand_in()
    opt = adahessian(model.parameters(), **{**HYPERS, 'n_acc': 2, **kwargs})
    return model,opt,lr_scheduler.StepLR(optimizer, 1, 0.5),torch.amp.GradScaler('cpu', init_scale=scale, growth_interval=2)


def test_a_complete_loop_steps_on_the_mean_of_its_batches():
    "Rates of 0.1, 0.05 and so on; the scale, a power of two which doubles at each second step, changes nothing"
    batches = split(*data(48), 6)
    model,opt,schedule,scaler = parts(probe=given())
    train(model, opt, batches, schedule, scaler)
    alone = mlp()
    twin = Twin([dict(params=list(alone.parameters()), **HYPERS)], given())
    for i in range(4): twin.step([partial(one_loss, alone, F.cross_entropy, x, y, 0) for x,y in batches[2*i:][:2]], lr=0.1*0.5**i)
    assert opt.n_steps==4 and scaler.get_scale()==2.**12
    assert max((p-q).abs().max() for p,q in zip(model.parameters(), alone.parameters()))<ROUNDING


def test_a_complete_loop_goes_on_from_a_file(tmp_path):
    "Between the two batches of a step"
    batches = split(*data(48), 6)
    model,*rest = parts()
    train(model, *rest[:1], batches[:3], *rest[1:])
    torch.save([o.state_dict() for o in (model,*rest,rest[1].optimizer)], tmp_path/'file')
    train(model, *rest[:1], batches[3:], *rest[1:])
    again,*others = parts()
    for o,state in zip((again,*others,others[1].optimizer), torch.load(tmp_path/'file', weights_only=False)): o.load_state_dict(state)
    train(again, *others[:1], batches[3:], *others[1:])
    assert all(torch.equal(p, q) for p,q in zip(model.parameters(), again.parameters()))


@pytest.mark.parametrize('make', [adahessian, sophia, hessian_free])
def test_what_pytorch_says_of_an_optimizer_that_is_not_its_own(make):
    "No class of PyTorch's is touched, so the words are PyTorch's; the tutorial says them and the way out"
    opt = make(mlp().parameters())
    for f in (partial(lr_scheduler.StepLR, step_size=1), partial(lr_scheduler.LambdaLR, lr_lambda=lambda i: 1.), lr_scheduler.ReduceLROnPlateau):
        with pytest.raises(TypeError, match='is not an Optimizer'): f(opt)
    assert Accelerator(cpu=True).prepare(opt) is opt
