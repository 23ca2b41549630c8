"A loop of one's own: schedule, accumulation, loss scale and file together do what each does alone; PyTorch's schedulers want a stand-in"
import math,warnings
import pytest,torch,torch.nn.functional as F
from accelerate import Accelerator
from contextlib import nullcontext
from functools import partial
from torch import nn
from torch.optim import lr_scheduler
from adahessian_fastai.all import Problem,adahessian as ours,adahessian_paper as adahessian,hessian_free,m_sassha,perturbed,sassha,sophia
from adahessian_fastai.estimators import Given
from adahessian_fastai.schedule import Every
from helpers_learner import HYPERS,ROUNDING,Cube,Once,data,fit,given,learner,mlp,one_loss,split
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


SCHEDULERS = dict(step=partial(lr_scheduler.StepLR, step_size=2, gamma=0.5), cosine=partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=3),
    onecycle=partial(lr_scheduler.OneCycleLR, max_lr=[0.1,0.01], total_steps=8), linear=partial(lr_scheduler.LinearLR, total_iters=4),
    plateau=partial(lr_scheduler.ReduceLROnPlateau, patience=0))

@pytest.mark.filterwarnings('ignore:2 of 2 parameters')
@pytest.mark.parametrize('name', SCHEDULERS)
def test_every_scheduler_sets_the_rate_of_each_group_through_a_stand_in(name):
    "As the tutorial does it; with no momentum past and no curvature, x moves by its rate times its gradient, 1, at each step"
    a,b = nn.Parameter(torch.zeros(1)),nn.Parameter(torch.zeros(1))
    opt = adahessian([[a],[b]], lr=1., wd=0., mom=0., hessian_power=0., eps=1e-12)
    other = torch.optim.SGD([dict(params=[nn.Parameter(torch.zeros(1))], lr=lr) for lr in (0.1,0.01)])
    schedule,rates,moved = SCHEDULERS[name](other),[],[]
    for i in range(6):
        opt.set_hyper('lr', [g['lr'] for g in other.param_groups])
        rates.append([g['lr'] for g in other.param_groups])
        before = [a.item(),b.item()]
        opt.differentiate((a+b).sum())
        for o in (opt,other): o.step()
        schedule.step(*([1.] if name=='plateau' else []))
        moved.append([p-q.item() for p,q in zip(before, (a,b))])
        opt.zero_grad()
    torch.testing.assert_close(torch.tensor(moved), torch.tensor(rates), rtol=1e-4, atol=1e-6)
    assert len({o[0] for o in rates})>1


def test_accelerate_hands_the_optimizer_back_and_saves_it_once_registered(tmp_path):
    batches = split(*data(48), 6)
    def prepared():
        accelerator,model = Accelerator(cpu=True),mlp()
        made = adahessian(model.parameters(), lr=0.1, update_each=3)
        model,opt = accelerator.prepare(model, made)
        assert opt is made
        accelerator.register_for_checkpointing(opt)
        return accelerator,model,opt
    def run(model, opt, batches):
        for x,y in batches:
            opt.differentiate(F.cross_entropy(model(x), y), group=getattr(model, 'process_group', None))
            opt.step()
            opt.zero_grad()
    accelerator,model,opt = prepared()
    run(model, opt, batches[:4])
    accelerator.save_state(tmp_path)
    run(model, opt, batches[4:])
    accelerator,again,opt2 = prepared()
    accelerator.load_state(tmp_path)
    assert opt2.n_steps==4
    run(again, opt2, batches[4:])
    assert all(torch.equal(p, q) for p,q in zip(model.parameters(), again.parameters()))


# A loop that leaves out `perturbed`

def three_steps(make, model, inside):
    "Three steps, inside a context or not: what was said"
    opt = make(model.parameters(), lr=0.05)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        for x,y in split(*data(18), 6):
            with inside(opt):
                out = model(x)
                opt.differentiate(Problem(list(model.parameters()), F.cross_entropy(out, y), out, y, F.cross_entropy))
            opt.step()
            opt.zero_grad()
    return [str(o.message) for o in said if 'does nothing in this loop' in str(o.message)]


NEVER = dict(usual=(ours,'with perturbed'), sassha=(sassha,'m_sassha'), m_sassha=(m_sassha,'with perturbed'), paper=(adahessian,None),
    sophia=(sophia,None), none=(partial(ours, rho=0),None))

@pytest.mark.parametrize('name', NEVER)
def test_a_loop_that_never_asks_for_its_perturbation_is_told_once(name):
    "With the remedy, by the first step; it trains as with no `rho`. One that asks hears nothing, except where a loop of one's own has no way"
    make,way = NEVER[name]
    said = three_steps(make, mlp(), nullcontext)
    assert len(said)==(way is not None) and all(way in o and 'rho=0' in o for o in said)
    assert len(three_steps(make, mlp(), perturbed))==(name=='sassha')


def test_a_learner_is_told_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        for make in (ours,sassha,m_sassha): fit(learner(mlp(), *data(18), opt_func=make, hypers={}))


def test_what_rho_does_inside_perturbed_is_what_it_does_in_a_learner():
    "Where it is left out the weights are those of `rho=0`, and others than inside"
    def weights(inside, **kwargs):
        three_steps(partial(ours, probe=given(), wd=0., **kwargs), model := mlp(), inside)
        return list(model.parameters())
    learn = fit(learner(mlp(), *data(18), probe=given(), opt_func=ours, hypers=dict(lr=0.05, wd=0.)))
    def far(a, b): return max((p-q).abs().max().item() for p,q in zip(a, b))
    assert far(weights(perturbed), learn.model.parameters())<ROUNDING
    assert far(weights(nullcontext), weights(nullcontext, rho=0))==0
    assert far(weights(perturbed), weights(nullcontext))>1e-4


@pytest.mark.parametrize('make', [ours, adahessian, partial(sophia, dense=20)], ids=['adahessian','paper','sophia'])
def test_gradients_that_come_past_a_due_estimate_are_told(make):
    "A loop that goes back to `loss.backward()`, as after loading a state: it would train on with the old average for ever"
    (x,y),model = data(12),mlp()
    opt = make(model.parameters())
    out = model(x)
    with perturbed(opt): opt.differentiate(Problem(list(model.parameters()), F.cross_entropy(out, y), out, y, F.cross_entropy))
    opt.step()
    opt.zero_grad()
    F.cross_entropy(model(x), y).backward()
    with pytest.warns(UserWarning, match=r'an estimate is due.*call `opt.differentiate\(loss\)` in place of `loss.backward'): opt.step()
    assert opt.n_steps==2


def test_gradients_of_ones_own_between_estimates_are_nobodys_business():
    (x,y),model = data(12),mlp()
    opt = adahessian(model.parameters(), update_each=3)
    opt.differentiate(F.cross_entropy(model(x), y))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for _ in range(3):
            opt.step()
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
    with pytest.warns(UserWarning, match='an estimate is due'): opt.step()


def test_auto_is_reverse_where_only_the_loss_is_known(capsys):
    (x,y),model = data(12),mlp()
    opt = adahessian(model.parameters(), hvp='auto')
    opt.differentiate(F.cross_entropy(model(x), y))
    assert opt.estimator.curvature.used=='reverse' and 'a loss alone cannot be evaluated again' in capsys.readouterr().out


@pytest.mark.parametrize('hvp', ['forward','finite_difference'])
def test_a_way_that_evaluates_again_says_what_it_needs(hvp):
    (x,y),model = data(12),mlp()
    ps,opt = list(model.parameters()),adahessian(model.parameters(), hvp=hvp)
    def evaluate(twice=False):
        out = model(x)
        return F.cross_entropy(out, y),out
    with pytest.raises(ValueError, match=r"give `opt.differentiate\(Problem\(params, loss, evaluate=f\)\)`.* or take hvp='reverse'"):
        opt.differentiate(evaluate()[0])
    opt.differentiate(Problem(ps, evaluate()[0], evaluate=evaluate))
    opt.step()
    assert opt.n_steps==1


def test_drawn_labels_say_what_they_need():
    (x,y),model = data(12),mlp()
    opt,out = sophia(model.parameters()),model(x)
    with pytest.raises(ValueError, match=r'call `opt.differentiate\(Problem\(params, loss, outputs, targets, loss_func\)\)`'):
        opt.differentiate(F.cross_entropy(out, y))
    opt.differentiate(Problem(list(model.parameters()), F.cross_entropy(out, y), out, y, F.cross_entropy))
    opt.step()
    assert opt.n_steps==1


@pytest.mark.parametrize('name,v', [('update_each',0), ('update_each','a'), ('update_each',2.5), ('update_each',(3,0)), ('dense',-1), ('dense',(20,4)),
    ('hessian_bs',0), ('hessian_bs','all')])
def test_a_schedule_that_is_set_by_hand_is_checked(name, v):
    "With the error of the constructor, and the old value stays"
    opt = ours(mlp().parameters())
    old = getattr(opt, name)
    with pytest.raises(ValueError, match=name): setattr(opt, name, v)
    assert getattr(opt, name)==old
    opt.update_each,opt.dense,opt.hessian_bs = (12,4),3,0.5
    assert [opt.when.part(i) for i in range(6)]==[0.5,0.5,0.5,0,0.5,0]

def test_a_loss_is_noted_without_its_scale():
    "Otherwise the guard of the loss sees the scale grow"
    p = nn.Parameter(torch.ones(2))
    opt = adahessian([p])
    opt.differentiate((p**2).sum()*1024, scale=1024)
    assert opt.pending.losses[0].item()==2

def test_an_accumulation_that_begins_with_nothing():
    "A first batch without items has no part in the mean"
    def after(*items):
        p = nn.Parameter(torch.ones(2))
        opt = adahessian([p], n_acc=len(items))
        for n in items: opt.differentiate((p**3).sum()*(n>0), n_items=n)
        opt.step()
        return p.tolist()
    assert after(0, 5)==after(5)


def test_a_step_with_nothing_to_do_says_nothing():
    "Without gradients, or with zeros, nobody went past `differentiate`"
    p = nn.Parameter(torch.ones(2))
    opt = adahessian([p], wd=0.)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        opt.step()
        opt.differentiate((p**4).sum())
        opt.step()
        p.grad.zero_()
        opt.step()
    assert opt.n_skipped==0

def test_gradients_past_an_optimizer_of_which_all_opted_out_are_welcome():
    p = nn.Parameter(torch.ones(2))
    opt = adahessian([p])
    opt.opt_out(p)
    (p**4).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        opt.step()
    assert opt.n_steps==1 and (p<1).all()

def test_after_a_skipped_step_nothing_is_pending():
    "Also where the loop clears the gradients itself"
    p = nn.Parameter(torch.ones(2))
    opt = adahessian([p])
    opt.differentiate((p**4).sum()*math.inf)
    with pytest.warns(UserWarning, match='step skipped'): opt.step()
    p.grad = None
    opt.differentiate((p**4).sum())
    opt.step()
    assert opt.n_steps==opt.n_skipped==1 and (p<1).all()

def test_an_infinite_loss_with_a_finite_gradient_is_skipped():
    p = nn.Parameter(torch.ones(2))
    opt = adahessian([p])
    opt.differentiate((p**4).sum()+math.inf)
    assert p.grad.isfinite().all()
    with pytest.warns(UserWarning, match='step skipped'): opt.step()
    assert p.tolist()==[1.,1.]

def test_a_finite_loss_with_a_gradient_that_is_not_is_skipped():
    "The diagonal is given, so that the gradient alone speaks; half of it is finite"
    p,q = (nn.Parameter(torch.ones(2)*o) for o in (0.,1.))
    opt = adahessian([p,q], estimator=Given(lambda problem, params: [torch.ones_like(o) for o in params]))
    opt.differentiate((p.sqrt()*0).sum()+(q**4).sum())
    assert p.grad.isnan().all() and q.grad.isfinite().all()
    with pytest.warns(UserWarning, match='its gradient is not finite: step skipped'): opt.step()
    assert (opt.n_skipped,opt.n_steps,p.tolist(),q.tolist())==(1,0,[0.,0.],[1.,1.]) and not opt.state[q].get('hess_step')

def test_a_schedule_hears_of_each_step_what_moved_in_it():
    "The same parameters have the same key, a part of them another one; the second step has no estimate"
    heard = []
    class Noted(Every):
        def tick(self, n_steps, part, key=None, **kwargs): heard.append((n_steps,part,key))
    p,q = (nn.Parameter(torch.ones(2)) for _ in range(2))
    opt = adahessian([p,q], when=Noted(2))
    for both in (True,True,False):
        opt.differentiate((p**4).sum()+(q**4).sum() if both else (p**4).sum())
        opt.step()
        opt.zero_grad()
    assert [o[:2] for o in heard]==[(1,None),(2,0),(3,None)] and heard[0][2]==heard[1][2]!=heard[2][2]

def test_a_loop_after_a_learner_asks_the_schedule_anew():
    "Of the Learner's last batch, which had no estimate, nothing is left"
    x,y = data(12)
    learn = fit(learner(mlp(), x, y, update_each=2))
    assert learn.opt.n_estimates==1
    learn.opt.differentiate(F.cross_entropy(learn.model(x), y))
    assert learn.opt.n_estimates==2 and len(learn.opt.diags)==6


@pytest.mark.parametrize('kwargs', [{}, dict(hvp='forward'), dict(hvp='finite_difference'), dict(curvature='ggn'), dict(estimator='gnb')], ids=str)
def test_a_problem_of_all_parameters_while_some_are_frozen(kwargs):
    "The list is made once, as in the tutorial; what is frozen keeps its place, and what the list lacks is trained too"
    def run(listed):
        x,y = data(24)
        model = mlp()
        opt = adahessian(model.parameters(), **{**HYPERS, **kwargs})
        ps = list(model.parameters())[listed]
        for i in range(4):
            model[0].requires_grad_(i%2==0)
            out = model(x)
            def again(twice=False): return F.cross_entropy(o := model(x), y), o
            torch.manual_seed(i)
            opt.differentiate(Problem(ps, F.cross_entropy(out, y), outputs=out, targets=y, loss_func=F.cross_entropy, model=model, evaluate=again))
            opt.step()
            opt.zero_grad(set_to_none=True)
        return list(model.parameters())
    want = run(slice(None))
    start = list(mlp().parameters())
    assert all((p-q).abs().max()>0 for p,q in zip(want, start))
    assert all(torch.equal(p, q) for p,q in zip(run(slice(2)), want))


def test_a_batch_that_fails_leaves_nothing_of_itself():
    "In an accumulation of two the batches after it are those of the step; before, the failed one had counted"
    def run(fails):
        p = nn.Parameter(torch.tensor([2.,1.], dtype=torch.double))
        def wrong(g): raise ArithmeticError
        opt = adahessian([p], n_acc=2)
        for k in (1.,None,1.,2.) if fails else (1.,2.):
            loss = (p**3).sum()*(k or 1.)
            if k is None: loss.grad_fn.register_prehook(wrong)
            with pytest.raises(ArithmeticError) if k is None else nullcontext(): opt.differentiate(loss, n_items=4)
        return p.grad,opt.diags[p],opt.n_batches,opt.n_items
    assert [str(o) for o in run(True)]==[str(o) for o in run(False)]


def test_gradients_are_set_to_none_as_pytorch_asks():
    for f in (ours, hessian_free):
        opt = f([p := nn.Parameter(torch.ones(2))])
        p.grad = torch.ones(2)
        opt.zero_grad(set_to_none=True)
        assert p.grad is None


@pytest.mark.parametrize('hvp', ['auto','finite_difference'])
def test_a_body_with_kinks_that_trains_later_is_looked_at_anew(hvp, capsys):
    "While it was frozen, finite differences suited"
    torch.manual_seed(0)
    model,x,y = nn.Sequential(nn.Sequential(nn.Linear(4,8), nn.ReLU(), nn.Linear(8,8), nn.ReLU()), nn.Linear(8,3)),torch.randn(16,4),torch.randint(3, (16,))
    model[0].requires_grad_(False)
    opt = adahessian(model.parameters(), hvp=hvp)
    def again(twice=False): return F.cross_entropy(o := model(x), y), o
    def step():
        loss,outs = again()
        opt.differentiate(Problem(list(model.parameters()), loss, outputs=outs, model=model, loss_func=F.cross_entropy, evaluate=again))
        opt.step()
        opt.zero_grad()
    step()
    assert opt.estimator.curvature.used=='finite_difference'
    model[0].requires_grad_(True)
    if hvp=='auto':
        step()
        assert opt.estimator.curvature.used=='reverse' and 'kink' in capsys.readouterr().out
    else:
        with pytest.raises(ValueError, match='kink'): step()


@pytest.mark.parametrize('hvp', ['reverse','forward'])
def test_autocast_around_a_whole_step_keeps_no_old_weights(hvp):
    "It keeps copies in half precision; a forward pass before `perturbed` made some, at the parameters before the move"
    def run(outside):
        torch.manual_seed(0)
        (x,y),model,casts,losses = data(16),mlp().float(),partial(torch.autocast, 'cpu', torch.bfloat16),[]
        x = x.float()
        opt = ours(model.parameters(), lr=0.05, hvp=hvp)
        def again(twice=False):
            with nullcontext() if outside else casts(): return F.cross_entropy(o := model(x), y), o
        for _ in range(4):
            with casts() if outside else nullcontext():
                again()
                with perturbed(opt):
                    loss,outs = again()
                    opt.differentiate(Problem(list(model.parameters()), loss, outputs=outs, evaluate=again))
            opt.step()
            losses.append(loss.item())
        return losses
    assert run(True)==pytest.approx(run(False), rel=1e-3) and len({*run(True)})==4


def test_a_network_is_checked_once_and_a_state_holds_plain_values(tmp_path):
    "A loss is a tensor, which has a method `half`; its answer is not asked for"
    net,seen = mlp(),[]
    opt = adahessian(net.parameters(), lr=0.05)
    first = opt.estimator.curvature.first
    opt.estimator.curvature.first = lambda *args: seen.append(1) or first(*args)
    for i,(x,y) in enumerate(split(*data(), 12)):
        opt.differentiate(F.cross_entropy(net(x), y))
        opt.step()
        opt.zero_grad()
    assert opt.n_estimates==3 and len(seen)==1
    torch.save(opt.state_dict(), tmp_path/'state.pth')
    assert torch.load(tmp_path/'state.pth')['curvature']['estimator']==dict(used='reverse', seen=(6,False))


def test_auto_on_a_loss_alone_checks_what_it_is_left_with(capsys):
    "A function that is differentiable once is refused, as with hvp='reverse'; nothing is said twice"
    x,y = data()
    class Body(nn.Module):
        def __init__(self, f):
            super().__init__()
            self.net,self.f = mlp(),f
        def forward(self, x): return self.f(self.net(x))
    for hvp in ('reverse','auto'):
        net = Body(Once.apply)
        opt = adahessian(net.parameters(), lr=0.05, hvp=hvp)
        with pytest.raises(RuntimeError, match='once_differentiable'): opt.differentiate(F.cross_entropy(net(x), y))
    net = Body(Cube.apply)
    opt = adahessian(net.parameters(), lr=1e-4, hvp='auto')
    capsys.readouterr()
    for _ in range(3):
        opt.differentiate(F.cross_entropy(net(x), y))
        opt.step()
        opt.zero_grad()
    assert capsys.readouterr().out.count('a loss alone cannot be evaluated again')==1 and opt.estimator.curvature.trusted


def test_a_loss_of_another_model_is_refused_at_the_first_step():
    "As in a Learner: nothing would move, in silence"
    x,y = data()
    opt,other = adahessian(mlp().parameters()),mlp()
    opt.differentiate(F.cross_entropy(other(x), y))
    with pytest.raises(ValueError, match='depends on no parameter of the optimizer'): opt.step()


def test_only_an_estimate_looks_through_the_graph(monkeypatch):
    "A walk through it takes Python's time, at each step"
    walks,leaves = [],Problem.leaves
    monkeypatch.setattr(Problem, 'leaves', lambda self: walks.append(1) or leaves(self))
    net,(x,y) = mlp(),data(6)
    opt = adahessian(net.parameters(), lr=1e-4, update_each=10)
    for _ in range(30):
        opt.differentiate(F.cross_entropy(net(x), y))
        opt.step()
        opt.zero_grad()
    assert len(walks)==opt.n_estimates==3
