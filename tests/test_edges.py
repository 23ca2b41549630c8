"Edge cases of optimizer, batch, steppers, schedule, learner and curvature, each of which the change of a single line would break"
import math,pytest,torch,torch.nn.functional as F,warnings
from torch import nn
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation
from adahessian_fastai.all import Budget,Every,Problem,adahessian_paper as adahessian,hessian_free,sassha,sophia
from adahessian_fastai.batch import CurvatureScale,check_rows_possible
from adahessian_fastai.curvature import FirstThatWorks,NoProductError,batch_statistics
from adahessian_fastai.learner import LossGuard,norms_of,steps_of_run
from adahessian_fastai.optimizer import remedy,upgraded
from helpers_learner import InTurn,Noted,data,fit,given,learner,mlp

def test_the_advice_names_the_largest_rate_and_the_bounds_that_are_off():
    a,b = (nn.Parameter(torch.ones(2)) for _ in range(2))
    opt = adahessian([[a],[b]], lr=slice(0.1,0.2), clip=3)
    assert remedy(opt)=='take a smaller learning rate than lr=0.2, or bound the steps with cap=0.1, spike=2'

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

def test_a_loop_after_a_learner_asks_the_schedule_anew():
    "Of the Learner's last batch, which had no estimate, nothing is left"
    x,y = data(12)
    learn = fit(learner(mlp(), x, y, update_each=2))
    assert learn.opt.n_estimates==1
    learn.opt.differentiate(F.cross_entropy(learn.model(x), y))
    assert learn.opt.n_estimates==2 and len(learn.opt.diags)==6

def test_an_overflow_of_one_parameter_is_one_of_all():
    "It may hide behind finite numbers elsewhere: the scale falls, and no estimate is used"
    p,q = (nn.Parameter(torch.ones(2)) for _ in range(2))
    opt = adahessian([p,q], probe=lambda o,_: torch.full_like(o, math.inf if o is p and opt.n_estimates else 1.))
    for _ in range(2):
        opt.zero_grad()
        opt.differentiate(((p**4).sum()+(q**4).sum())*1024, scale=1024.)
        for o in (p,q): o.grad.div_(1024)
        assert [d.isfinite().all().item() for d in opt.diags.values()]==[opt.n_estimates==1,True]
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            opt.step()
    assert opt.curvature_scale.c==0.5 and opt.n_dropped==1 and all(opt.state[o]['hess_step']==1 for o in (p,q))

def test_drawn_labels_leave_the_scale_of_curvature_alone():
    "They have no second derivative that could overflow"
    x,y = data(12)
    model = mlp()
    opt = sophia(model.parameters(), dense=20)
    out = model(x)
    opt.differentiate(Problem(list(model.parameters()), F.cross_entropy(out, y)*1024, out, y, F.cross_entropy, scale=1024.))
    assert not opt.pending.scaled

def test_an_estimate_that_is_dropped_everywhere_has_no_noise():
    p = nn.Parameter(torch.ones(2))
    opt = adahessian([p], n_samples=2, probe=lambda o,_: torch.full_like(o, math.inf))
    opt.differentiate((p**4).sum())
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        opt.step()
    assert opt.n_dropped==1 and len(opt.noise_record)==0

def test_an_old_file_says_of_a_loss_that_was_not_finite_and_of_parameters_that_had_no_estimate():
    own = dict(seed=1, n_steps=5, n_estimates=5, n_dropped=0, n_skipped=0, n_batches=1, n_items=6, bad_loss=True)
    new = upgraded(dict(wrapper=own, state=[{},dict(hess_step=5, step=5)], hypers=[{}]))
    assert [math.isnan(o) for o in new['curvature']['pending']['losses']]==[True] and new['state']==[{},dict(hess_step=5, step=5, age=5)]

def test_one_odd_parameter_among_others_opts_nothing_out():
    p,other = (nn.Parameter(torch.ones(2)) for _ in range(2))
    opt = adahessian([p])
    with pytest.raises(ValueError, match='got 1 of 2 that are none'): opt.opt_out([p,other])
    assert 'do_hessian' not in opt.state[p]

def test_a_part_at_the_budget_is_within_it():
    "0.1+0.2 is a little above 0.3"
    assert Budget(0.3).part_for(0.1, 0.1+0.2)[0]==1.

def test_steps_that_take_no_time_are_measured_ten_times_as_long():
    when,n = Budget(0.25, 12, clock=iter(i*1e-9 for i in range(1000)).__next__),0
    while not when.done and n<500:
        part,n = when.part(n),n+1
        when.tick(n, part)
    assert n==120

def test_an_own_schedule_is_used_itself():
    class Own(Every): pass
    when = Own(3)
    assert adahessian([nn.Parameter(torch.ones(1))], when=when).when is when

def said_of(*losses):
    guard = LossGuard()
    return [o for o in map(guard, losses) if o]

def test_a_loss_has_grown_where_it_was_far_below_the_first():
    "Ten times its best, and above a tenth of the first one"
    assert len(said_of(1., *[0.001]*600, *[0.5]*60))==1

def test_of_a_loss_below_zero_nothing_is_said(): assert said_of(1., *[-5.]*20, *[0.9]*200)==[]

def test_the_loss_of_a_step_is_the_mean_of_its_batches():
    p = nn.Parameter(torch.ones(2))
    opt = adahessian([p], n_acc=2)
    for k in (1,3): opt.differentiate(k*(p**2).sum())
    opt.step()
    assert opt.counts.guard.first==4

def test_a_state_begins_the_average_of_the_loss_anew():
    p = nn.Parameter(torch.ones(2))
    opt = adahessian([p], lr=0.)
    def step(k):
        opt.differentiate(k*(p**2).sum())
        opt.step()
    step(1e-3)
    opt.load_state_dict(opt.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for _ in range(5): step(1.)
    assert opt.counts.guard.first==2

def test_a_gradient_of_which_nothing_is_known_is_not_scaled():
    scale = CurvatureScale()
    assert scale.fit([torch.tensor([4.])], 1.)==8
    assert scale.fit([torch.zeros(2)], 1.)==scale.fit([torch.tensor([math.inf])], 1.)==scale.fit([], 1.)==1

def test_what_a_callback_does_to_the_number_it_shows_changes_no_curvature():
    "`loss` is a copy of `loss_grad`, in each evaluation"
    class Doubles(Callback):
        order = -30
        def after_loss(self): self.learn.loss.mul_(2)
    def one(cbs): return fit(learner(mlp(), *data(12), probe=given(), hvp='forward', cbs=cbs)).model
    assert all(map(torch.equal, one([]).parameters(), one([Doubles()]).parameters()))

def test_curvature_in_evaluation_hears_no_backward_pass():
    "As in validation, where the loss has no such part"
    class Penalty(Callback):
        def before_backward(self): self.learn.loss_grad = self.loss_grad+sum(p.square().sum() for p in self.model.parameters())
    model = mlp()
    v = [torch.ones_like(p) for p in model.parameters()]
    def product(cbs, train): return learner(model, *data(12), cbs=cbs).curvature_product(train=train)(v)[0]
    assert torch.equal(product([], False), product([Penalty()], False)) and not torch.equal(product([], True), product([Penalty()], True))

def test_a_measurement_leaves_no_attribute():
    learn = learner(mlp(), *data(12))
    before = set(vars(learn))
    learn.curvature_product()([torch.ones_like(p) for p in learn.model.parameters()])
    assert not {'xb','yb','pred','loss','loss_grad','training'} & (set(vars(learn))-before)

calls = [] # In a method of a class it is not put back

class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()
    def forward(self, x):
        calls.append(self.training)
        return self.net(x)

def counted(**kwargs):
    "Forward passes of two batches in training"
    calls.clear()
    fit(learner(Counting(), *data(12), **kwargs))
    return sum(calls)

@pytest.mark.parametrize('rho,n', [(0,2),(None,2),(0.1,4)])
def test_no_distance_needs_no_second_pass(rho, n): assert counted(opt_func=sassha, hypers={}, rho=rho)==n

def test_more_rows_of_inputs_than_of_targets_are_refused_too():
    learn = learner(mlp(), *data(12))
    learn.xb,learn.yb = (torch.zeros(12,5),),(torch.zeros(6),)
    with pytest.raises(ValueError, match='12 rows of inputs for 6'): check_rows_possible(learn, 3, 6)

def test_a_way_is_looked_at_though_one_before_it_was_right():
    "The second one starts without the trust in the first"
    used = []
    def build(way):
        def product(v):
            used.append(way)
            if len(used)==2: raise RuntimeError('no more')
            return v
        return product
    product = FirstThatWorks(['a','b'], build, lambda way: 'it is wrong' if way=='b' else '')
    assert product(1)==1
    with pytest.raises(NoProductError, match='it is wrong'): product(1)

def test_a_batch_norm_without_running_statistics_stays_one():
    model = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.BatchNorm1d(3))
    with batch_statistics(model): assert not any(m.track_running_stats for m in model)
    assert [m.track_running_stats for m in model]==[False,True]

def test_the_first_look_is_the_only_one():
    learn = fit(learner(mlp(), *data(12)))
    assert learn.opt.estimator.curvature.trusted

def test_nothing_of_a_pass_with_dual_numbers_is_kept():
    learn = fit(learner(mlp(), *data(12), curvature='ggn', hvp='forward'))
    assert learn.opt.n_estimates==2 and learn.opt.estimator.curvature.ride is None

def test_an_accumulation_of_less_than_a_batch_makes_no_more_steps():
    learn = learner(mlp(), *data(36), cbs=[GradientAccumulation(3)])
    learn.create_opt()
    assert steps_of_run(learn, 2)==12

def test_the_noise_of_a_group_leaves_out_what_was_dropped():
    p,q = (nn.Parameter(torch.ones(2)) for _ in range(2))
    opt = adahessian([p,q], n_samples=2, probe=lambda o,_: torch.full_like(o, math.inf) if o is p else torch.randn_like(o))
    opt.differentiate((p**4).sum()+(q**4).sum())
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        opt.step()
    assert opt.n_dropped==1 and opt.noise_record[0][1].isfinite().all()

def test_a_square_of_gradients_weighs_one_in_a_dense_start():
    "Estimates weigh less there, as there are more of them"
    p,q = (nn.Parameter(torch.ones(2)) for _ in range(2))
    opt = adahessian([p,q], update_each=10, dense=20)
    opt.opt_out(q)
    opt.differentiate((p**4).sum()+(q**4).sum())
    opt.step()
    assert opt.state[p]['hess_step']==0.1 and opt.state[q]['hess_step']==1

def test_a_first_batch_of_which_nothing_counts_has_no_part_in_the_gradient():
    "Its loss is not a number"
    x,y = data(12)
    y = torch.cat([torch.full((6,), -100),y[6:]])
    grads = Noted('after_step', lambda l: [p.grad.clone() for p in l.model.parameters()])
    fit(learner(mlp(), x, y, opt_func=hessian_free, hypers={}, n_acc=2, cbs=[grads]))
    model = mlp()
    F.cross_entropy(model(x[6:]), y[6:]).backward()
    assert all(torch.allclose(a, p.grad) for a,p in zip(grads.notes[-1], model.parameters()))

def test_a_parameter_that_later_batches_do_not_use_has_its_share():
    "Half of the first batch's gradient"
    x,y = data(12)
    learn = learner(InTurn(), x, y, opt_func=hessian_free, hypers={}, n_acc=2)
    grads = Noted('after_step', lambda l: l.model.heads[1].bias.grad.clone())
    fit(learn.add_cb(grads))
    model = InTurn()
    F.cross_entropy(model(x[:6]), y[:6]).backward()
    assert torch.allclose(grads.notes[-1], model.heads[1].bias.grad/2)

def test_a_loss_that_reaches_no_parameter_is_named():
    other = nn.Parameter(torch.ones(1).double())
    learn = learner(mlp(), *data(12), loss_func=lambda pred,y: (other**2).sum(), opt_func=hessian_free, hypers={})
    with pytest.raises(ValueError, match='depends on no parameter of the optimizer'): fit(learn)

def test_a_norm_belongs_to_its_tensor_where_one_is_empty():
    assert [n.item() for n in norms_of([torch.zeros(0),torch.ones(4),torch.zeros(0),torch.ones(9)])]==[0,2,0,3]

def test_the_scale_of_curvature_goes_with_a_state():
    p = nn.Parameter(torch.ones(2))
    a,b = (adahessian([p]) for _ in range(2))
    a.curvature_scale.update(False)
    b.load_state_dict(a.state_dict())
    assert b.curvature_scale.c==0.5
