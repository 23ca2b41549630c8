"A budget for curvature, on a clock of the test's own"
import math,pickle,time

import pytest,torch
from fastai.basics import Callback,CrossEntropyLossFlat,DataLoaders,Learner,partial,set_seed
from torch import nn

from adahessian_fastai.adahessian import AdaHessian,AdaHessianWrapper,adahessian as default,adahessian_paper as adahessian
from adahessian_fastai.schedule import Budget,Every,check_period,due_now,is_due,rows_due
from adahessian_fastai.sophia import sophia

class Clock:
    "Seconds as `opt` would spend them: `cost` for a step with an estimate, 1 for another"
    def __init__(self, cost, noise=lambda n: 0.): self.now,self.cost,self.noise,self.n,self.opt = 0.,cost,noise,0,None
    def __call__(self):
        self.now += (self.cost if self.opt.diags else 1.)+self.noise(self.n)
        self.n += 1
        return self.now

class RowClock(Clock):
    "An estimate takes `a` steps, and `b` more for the whole batch"
    def __init__(self, a, b):
        super().__init__(0.)
        self.a,self.b = a,b
    def __call__(self):
        self.cost = 1+self.a+self.b*(rows_due(self.opt.n_steps-1, self.opt.hessian_bs) or 1)
        return super().__call__()

def learner(clock=None, budget=0.25, n_measured=12, cbs=(), **kwargs):
    set_seed(1)
    ds = list(zip(torch.randn(160,4), torch.randint(2, (160,))))
    dls = DataLoaders.from_dsets(ds, ds[:8], bs=8, shuffle=False, num_workers=0)
    if clock: kwargs['budget'] = Budget(budget, n_measured, clock)
    model,opt_func = nn.Sequential(nn.Linear(4,8), nn.Tanh(), nn.Linear(8,2)),partial(adahessian, lr=0.05, **kwargs)
    learn = Learner(dls, model, CrossEntropyLossFlat(), opt_func=opt_func, cbs=cbs)
    learn.create_opt()
    if clock: clock.opt = learn.opt
    return learn

def fit(learn, n=2):
    with learn.no_bar(),learn.no_logging(): learn.fit(n)
    return learn

def estimates(update_each, n): return sum(is_due(i, update_each) for i in range(n))

@pytest.mark.parametrize('cost,budget,k', [(3.,0.25,8), (2.1,0.25,5), (3.,2.,1), (3.,1.9,2), (1.,0.1,1), (0.9,0.1,1), (4.,0.05,60)])
def test_period(cost, budget, k, capsys):
    learn = fit(learner(Clock(cost), budget))
    assert learn.opt.update_each==(12,k)
    assert learn.opt.n_estimates==estimates((12,k), 40)
    assert f"update_each={(12,k)}" in capsys.readouterr().out
    assert (cost-1)/k <= budget+1e-9 and (k==1 or (cost-1)/(k-1) > budget)

def test_outliers_and_the_first_step_do_not_matter():
    "A validation epoch in between, a cold start"
    clock = Clock(3., noise=lambda n: {0: 100., 1: 5., 6: 50.}.get(n, 0.))
    assert fit(learner(clock)).opt.update_each==(12,8)

def test_repeats_bit_by_bit():
    first = fit(learner(Clock(2.6)))
    again = fit(learner(update_each=first.opt.update_each))
    other = fit(learner(update_each=first.opt.update_each[1]))
    same = lambda a,b: all(map(torch.equal, a.model.parameters(), b.model.parameters()))
    assert same(first, again) and not same(first, other)

@pytest.mark.parametrize('dense', [6,(6,2)])
def test_a_dense_start_repeats_bit_by_bit(dense):
    "An estimate of the start weighs as it did while the budget was measuring"
    first = fit(learner(Clock(2.6), dense=dense))
    again = fit(learner(update_each=first.opt.update_each, dense=dense))
    assert first.opt.update_each==(18,7) and all(map(torch.equal, first.model.parameters(), again.model.parameters()))

@pytest.mark.parametrize('noise', [lambda n: (n%3)*1.5, lambda n: -0.999 if n%2 else 0.], ids=['busy','short'])
def test_steps_that_differ_or_are_short_are_met_with_care(noise, capsys):
    "A period at least as long as that of steady steps, and the message says why"
    learn = fit(learner(Clock(3., noise)))
    assert 'at worst, as steps are short or differ' in capsys.readouterr().out and learn.opt.update_each[1]>=8
    fit(learner(Clock(3.)))
    assert 'at worst' not in capsys.readouterr().out

def test_measures_only_once():
    clock = Clock(3.)
    learn = fit(learner(clock), 3)
    assert clock.n==12
    before = learn.opt.update_each
    clock.cost = 30.
    assert fit(learn).opt.update_each==before and clock.n==12

@pytest.mark.parametrize('key', ['budget','when'])
def test_every_optimizer_of_a_budget_measures_for_itself(key):
    clock = Clock(3.)
    opt_func = partial(adahessian, lr=0.05, **{key: Budget(0.25, 12, clock)})
    for clock.cost,k in ((3.,8), (2.1,5)):
        learn = learner()
        learn.opt_func = opt_func
        learn.create_opt()
        clock.opt = learn.opt
        assert fit(learn).opt.update_each==(12,k)

def test_an_object_as_a_budget_takes_what_it_was_not_told():
    p = nn.Parameter(torch.ones(1))
    def when(*args, **kwargs): return default([p], budget=Budget(*args), **kwargs).when
    assert when(0.25).dense==20 and when(0.25, None, time.perf_counter, None, 7).dense==7
    assert when(0.25, dense=5).dense==5 and when(0.25, dense=0).dense==0
    assert when(0.25, None, time.perf_counter, 'auto').hessian_bs=='auto' and when(0.25, hessian_bs=0.5).hessian_bs==0.5
    assert default([p], when=Budget(0.25)).when.dense==0
    for told in (dict(hessian_bs=0.25), dict(hessian_bs='auto'), dict(dense=7)):
        with pytest.raises(ValueError, match='a Budget what it was told'):
            default([p], budget=Budget(0.25, **told), **{k: 0.5 if k=='hessian_bs' else 5 for k in told})

def test_every_optimizer_of_a_period_has_its_own():
    opt_func = partial(adahessian, when=Every(3))
    a,b = (opt_func([nn.Parameter(torch.ones(1))]) for _ in range(2))
    a.update_each = 7
    assert b.update_each==3 and opt_func.keywords['when'].update_each==3

def test_period_is_in_the_state():
    learn = fit(learner(Clock(3.)))
    clock = Clock(30.)
    other = learner(clock)
    other.opt.load_state_dict(learn.opt.state_dict())
    fit(other)
    assert other.opt.update_each==(12,8) and clock.n==0

def test_saved_in_the_middle_of_the_measurement():
    learn = learner(Clock(3.))
    batches = [b for b in learn.dls.train][:7]
    for x,y in batches: learn.opt.differentiate(learn.loss_func(learn.model(x), y)), learn.opt.step(), learn.opt.zero_grad()
    other = learner(Clock(3.))
    other.opt.load_state_dict(learn.opt.state_dict())
    assert fit(other).opt.update_each==(12,8)

def test_plain_loop():
    torch.manual_seed(0)
    p,clock = nn.Parameter(torch.randn(5)),Clock(2.)
    opt = adahessian([p], lr=0.01, budget=Budget(0.5, clock=clock))
    clock.opt = opt
    for _ in range(13): opt.differentiate((p**4).sum()), opt.step(), opt.zero_grad()
    assert opt.update_each==(12,2)

@pytest.mark.parametrize('budget', [0, -0.5, math.nan, math.inf, '0.25'])
def test_budgets_that_are_none(budget):
    for f in (adahessian,default):
        with pytest.raises(ValueError, match='budget must be a number'): f([nn.Parameter(torch.ones(1))], budget=budget)

def test_one_of_both():
    with pytest.raises(ValueError, match='update_each'): adahessian([nn.Parameter(torch.ones(1))], budget=0.25, update_each=4)

@pytest.mark.parametrize('update_each', [0, -1, 1.5, True, (3,0), (3,), (1,2,3), '4', None])
def test_periods_that_are_none(update_each):
    with pytest.raises(ValueError, match='update_each'): check_period(update_each)

def auto(clock, budget=0.25, **kwargs): return learner(clock, budget, 18, hessian_bs='auto', **kwargs)

def same(a, b): return all(map(torch.equal, a.model.parameters(), b.model.parameters()))

@pytest.mark.parametrize('a,b,budget,part,k', [(0.,2.4,1.,3/8,1), (0.,2.4,0.3,1/8,1), (0.,2.4,0.15,1/8,2), (0.1,2.4,0.1,1/8,4), (0.5,0.,0.4,1/8,2),
    (0.5,0.,0.5,1.,1), (0.2,2.,3.,1.,1), (0.25,2.,1.25,1/2,1)])
def test_part_of_the_batch_and_period(a, b, budget, part, k, capsys):
    learn = fit(auto(RowClock(a, b), budget))
    assert (learn.opt.hessian_bs,learn.opt.update_each)==((18,part),(18,k))
    assert f"update_each={(18,k)}, hessian_bs={(18,part)} repeats" in capsys.readouterr().out
    assert (a+b*part)/k <= budget+1e-6
    assert k==1 and (part==1 or a+b*(part+1/8)>budget) or part==1/8 and (a+b*part)/(k-1)>budget

def test_parts_repeat_bit_by_bit():
    first = fit(auto(RowClock(0.1, 2.4), 0.2))
    given = dict(update_each=first.opt.update_each, hessian_bs=first.opt.hessian_bs)
    assert given==dict(update_each=(18,2), hessian_bs=(18,1/8))
    assert same(first, fit(learner(**given)))
    assert not same(first, fit(learner(**{**given, 'hessian_bs': 1/8}))) and not same(first, fit(learner(**{**given, 'hessian_bs': (4,1/8)})))

def test_parts_are_those_that_are_evaluated():
    "Two sizes in turn while it measures, then the chosen one"
    learn,rows = auto(RowClock(0., 2.4), 0.6),[]
    class Counts(nn.Module):
        def forward(self, x):
            if learn.training: rows.append(len(x))
            return x
    learn.model = nn.Sequential(Counts(), *learn.model)
    fit(learn, 1)
    assert [n for n in rows if n!=8]==[2]*7 # at the 2nd, 4th, ... of nine estimates all 8 rows, on the graph that is there; never a single one
    assert len(rows)==20+7

@pytest.mark.parametrize('n', [7,11,17,18,23])
def test_parts_in_the_state(n):
    "A run that is cut off goes on, chooses the same, and says how to repeat it"
    set_seed(0)
    batches = [(torch.randn(8,4),torch.randint(2, (8,))) for _ in range(40)]
    def train(learn, xys):
        learn.training = True
        for x,y in xys:
            learn.xb,learn.yb = (x,),(y,)
            with learn.opt.forward_context(learn):
                learn.pred = learn.model(x)
                learn.loss_grad = learn.loss_func(learn.pred, y)
                learn.opt.backward(learn)
                learn.opt.step()
            learn.opt.zero_grad()
        return learn
    straight = train(auto(RowClock(0.1, 2.4), 0.2), batches)
    first,second = train(auto(RowClock(0.1, 2.4), 0.2), batches[:n]),auto(RowClock(0.1, 2.4), 0.2)
    second.model.load_state_dict(first.model.state_dict())
    second.opt.load_state_dict(first.opt.state_dict())
    train(second, batches[n:])
    opt = second.opt
    assert (opt.update_each[1],opt.hessian_bs[1])==(2,1/8) and opt.when.done
    if n!=17: assert same(straight, second) # its first step after the break begins at an unknown time, so there one more pair of sizes is measured
    repeated = train(learner(update_each=opt.update_each, hessian_bs=opt.hessian_bs), batches)
    assert same(repeated, second)

@pytest.mark.parametrize('hessian_bs', [0, -1, 1.5, 0., True, (0,0.5), (3,0), (3,), (1,2,3), (2.,0.5), '4'])
def test_parts_that_are_none(hessian_bs):
    with pytest.raises(ValueError, match='hessian_bs'): adahessian([nn.Parameter(torch.ones(1))], hessian_bs=hessian_bs)

def test_nobody_chooses():
    with pytest.raises(ValueError, match="with budget=0.25, say, 'auto', got hessian_bs='auto'"): adahessian([nn.Parameter(torch.ones(1))], hessian_bs='auto')

@pytest.mark.parametrize('bs', [8,80])
def test_validation_is_no_part_of_a_step(bs, capsys):
    "Also with two batches in an epoch, whose estimates all begin one"
    class Validates(Callback):
        def before_validate(self): clock.now += 1000.
    clock = Clock(3.)
    learn = learner(clock)
    learn.dls = DataLoaders.from_dsets(*[o.dataset for o in learn.dls.loaders], bs=bs, shuffle=False, num_workers=0)
    learn.add_cb(Validates())
    assert fit(learn, 2 if bs==8 else 8).opt.update_each==(12,8)

DRAWS = dict(hutchinson={}, gnb=dict(estimator='gnb'), control=dict(estimator='control_variate', probe='gaussian', signed=True), forward=dict(hvp='forward'),
    ride=dict(curvature='ggn', hvp='forward'), rows=dict(hessian_bs=0.5), n_acc=dict(n_acc=2))

@pytest.mark.parametrize('kwargs', DRAWS.values(), ids=list(DRAWS))
def test_a_dense_start_may_draw_more_probes(kwargs):
    "As long as it lasts, each estimate is one with so many samples; afterwards it is as it was"
    def ends(**more):
        seen = []
        class Notes(Callback):
            def after_batch(self):
                if self.training: seen.append(torch.cat([p.detach().flatten() for p in self.model.parameters()]))
        fit(learner(**{**kwargs, **more}, cbs=[Notes()]), 1)
        return seen
    few,many,pair,one = ends(update_each=2, dense=4),ends(update_each=2, dense=4, n_samples=3),ends(update_each=2, dense=(4,3)),ends(update_each=2, dense=(4,1))
    steps = 4*kwargs.get('n_acc', 1)
    assert all(torch.equal(a, b) for a,b in zip(pair[:steps], many[:steps], strict=True)) and not torch.equal(pair[steps-1], few[steps-1])
    assert not torch.equal(pair[-1], many[-1]) and torch.equal(one[-1], few[-1])

def test_an_error_in_a_dense_start_leaves_the_estimator_alone():
    def broken(p, g): 1/0
    learn = learner(dense=(4,3), probe=broken)
    with pytest.raises(ZeroDivisionError): fit(learn, 1)
    assert learn.opt.estimator.n_samples==1 and learn.opt.dense==4

@pytest.mark.parametrize('dense', [-1, (3,0), (-1,2), (2.,3), (1,2,3), None, '3', True])
def test_starts_that_are_none(dense):
    with pytest.raises(ValueError, match='dense'): adahessian([nn.Parameter(torch.ones(1))], dense=dense)

@pytest.mark.parametrize('given', [dict(update_each=3), dict(dense=5), dict(hessian_bs=0.5), dict(budget=0.25)], ids=str)
def test_a_schedule_comes_without_what_it_decides(given):
    "Beside it that is refused; the defaults of a factory are nobody's"
    p = [nn.Parameter(torch.ones(1))]
    for f in (default, adahessian, sophia):
        assert f(p, when=Every(4)).update_each==4
        if f is sophia and 'budget' in given: continue
        with pytest.raises(ValueError, match=f"when everything.*{list(given)[0]}="): f(p, when=Every(4), **given)
    with pytest.raises(ValueError, match='when everything'): AdaHessianWrapper(AdaHessian(p, lr=0.1), when=Every(4), **given)

def test_budgets_can_be_pickled():
    "With an optimizer that measures, too"
    p = nn.Parameter(torch.ones(3))
    opt = pickle.loads(pickle.dumps(adahessian([p], budget=0.25)))
    p = opt.param_lists[0][0]
    for _ in range(3): opt.differentiate((p**4).sum()), opt.step(), opt.zero_grad()
    assert pickle.loads(pickle.dumps(opt.when)).times==opt.when.times!={}

@pytest.mark.parametrize('kwargs', [dict(n_measured=0), dict(n_measured=2.5), dict(least_seconds=-1), dict(least_seconds='1')], ids=str)
def test_arguments_of_a_budget_are_looked_at(kwargs):
    with pytest.raises(ValueError, match=list(kwargs)[0]): Budget(0.25, **kwargs)

@pytest.mark.parametrize('kwargs', [dict(budget=0.5), dict(hessian_bs=0.5), dict(hessian_bs='auto')], ids=str)
def test_a_checkpoint_does_not_answer_for_another_budget(kwargs):
    "What was measured for 0.25 is not taken for 0.5, nor a schedule without 'auto' for one with it"
    learn,other = fit(learner(Clock(3.))),learner()
    args = {'budget': 0.25, 'hessian_bs': None, **kwargs}
    clock = RowClock(0.5, 1.5)
    other.opt = adahessian(other.model.parameters(), lr=0.05, budget=Budget(args['budget'], 12, clock, args['hessian_bs']))
    clock.opt = other.opt
    other.opt.load_state_dict(learn.opt.state_dict())
    assert not other.opt.when.done and other.opt.hessian_bs==args['hessian_bs']
    assert fit(other).opt.when.done and clock.n>0


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

def test_a_schedule_that_lacks_a_method_is_refused_before_anything_moves():
    class Mine:
        def part(self, age): return None
    with pytest.raises(ValueError, match='without begin, tick, state_dict, load_state_dict'): default([nn.Parameter(torch.ones(2))], when=Mine())

def test_what_was_set_by_hand_beside_a_budget_is_kept():
    opt,new = (default([nn.Parameter(torch.ones(2))], budget=0.25) for _ in range(2))
    opt.hessian_bs = 0.5
    new.load_state_dict(opt.state_dict())
    assert new.hessian_bs==0.5

def test_a_period_that_no_budget_chose_is_not_taken_for_the_choice_of_one():
    "As in a file of version 0.0.1 that was trained without a budget"
    b = Budget(0.25)
    before = b.update_each
    b.load_state_dict(dict(update_each=1, hessian_bs=None, done=False))
    assert b.update_each==before and not b.done
    b.load_state_dict(dict(update_each=(12,7), hessian_bs=None, done=True))
    assert b.update_each==(12,7) and b.done

def test_a_debiased_average_of_an_estimator_without_samples_is_refused():
    class Own:
        def __call__(self, *args): return None
        def surround(self, *args): return None
    with pytest.raises(ValueError, match='n_samples'): default([nn.Parameter(torch.ones(2))], debiased=True, estimator=Own())

@pytest.mark.parametrize('name', ['clip','cap','spike'])
def test_none_is_no_bound_wherever_it_is_set(name):
    opt = default([nn.Parameter(torch.ones(2))])
    opt.set_hyper(name, None)
    assert opt.hypers[0][name]==0

# A schedule's parts, one by one

def test_an_estimate_of_a_dense_start_weighs_what_its_step_is_of_a_period():
    "One in five, or one in two within the first 8 of a pair; from the end of the start on, all of it"
    assert [Every(5, dense=3).weight(i) for i in (0,2,3,4)]==[1/5,1/5,1,1]
    assert [Every((8,5), dense=9).weight(i) for i in (0,7,8,9)]==[1/2,1/2,1/5,1]
    assert [Every(5, dense=(3,4)).samples(i) for i in (0,2,3)]==[4,4,1]

def test_a_single_row_is_no_whole_batch(): assert [Every(1, o).part(0) for o in (1,1.,0.5,8)]==[1,None,0.5,8] and type(Every(1, 1).part(0)) is int

def test_what_is_due_where_parameters_are_of_different_age():
    "With the probes of the youngest; one that came late has its estimate on the part of the batch that any estimate has"
    a,b = 'ab'
    assert due_now(Every(2, 0.5, dense=(2,3)), {a: dict(age=1), b: dict(age=4)})==([a,b],0.5,3)
    assert due_now(Every(10, 0.5), {a: dict(age=3, late=True), b: dict(age=3)})==([a],0.5,1)
    assert due_now(Every(10), {a: dict(age=3)})==due_now(Every(10), {a: dict(age=10, do_hessian=False)})==((),0,1)
    assert due_now(Every(10), {a: dict(age=10, asked=10)}).params==() and due_now(Every(10), {a: dict(age=10, asked=0)}).params==[a]

@pytest.mark.parametrize('budget', [True,10.5])
def test_a_budget_is_a_number_up_to_ten(budget):
    with pytest.raises(ValueError, match='budget must be a number'): Budget(budget)
    assert Budget(10).overhead==10

def test_a_new_budget_is_told_what_the_old_one_was():
    old = Budget(0.5, 7, Clock(1.), 0.25, (3,2), 9.)
    new = old.anew(0.5, 4)
    assert {k: vars(new)[k] for k in ('overhead','n_measured','clock','asked','dense','probes','least_seconds','update_each')}==dict(overhead=0.5,
        n_measured=7, clock=old.clock, asked=[0.5,0.25], dense=3, probes=2, least_seconds=9., update_each=(10,2))
    assert new is not old and new.times is not old.times

def measured(times, **kwargs):
    when = Budget(0.25, **kwargs)
    for k,v in times.items(): when.times[k].update(v)
    return when

def test_what_is_known_of_steps_that_move_different_parameters():
    "One kind of step with both is enough, and each kind counts for itself"
    when = measured(dict(a={0: [1.]*4, 1.: [3.]*4}, b={0: [100.]*4, 1.: []}))
    assert when.known() and when.ratio()==2. and not measured(dict(a={0: [1.], 1.: []}, b={0: [], 1.: [1.]})).known()

def test_care_needs_four_steps_of_each_kind():
    "A quartile of fewer says nothing, so there the median counts; steps of 1 to 3 are unsure"
    for times in ({0: [1.,3.,1.,3.,1.], 1.: [4.]}, {0: [1.], 1.: [2.,4.,6.,4.,2.]}): assert measured(dict(a=times)).ratio()==3.
    assert measured(dict(a={0: [1.,3.,1.,3.], 1.: [4.,4.,4.,8.]})).ratio()==7/1-1

def test_steps_are_unsure_by_their_median_and_by_the_quartiles_of_each_kind():
    assert not measured(dict(a={0: [0.006,0.006,0.0001], 1.: [0.01]*4})).unsure() and measured(dict(a={0: [0.004,0.004,9.], 1.: []})).unsure()
    assert measured(dict(a={0: [1.]*9, 1.: [2.,2.,2.,3.,4.,4.]})).unsure() and not measured(dict(a={0: [1.]*9, 1.: [2.,2.,2.,2.,2.,4.]})).unsure()

def test_the_steps_of_a_period_of_a_pair_and_of_a_dense_start():
    "A pair has every other step before the n-th, and multiples of its period from there on"
    def of(*args): return [i for i in range(21) if is_due(i, *args)]
    assert (of(8),of((4,8)),of((5,8)),of(8, 3))==([0,8,16],[0,2,8,16],[0,2,4,8,16],[0,1,2,8,16])

@pytest.mark.parametrize('k,odd', [('update_each',0), ('hessian_bs',2.), ('dense',-1)])
def test_what_is_set_in_the_middle_of_a_training_is_looked_at(k, odd):
    opt = default([nn.Parameter(torch.ones(1))])
    with pytest.raises(ValueError, match=k): setattr(opt, k, odd)
    assert (opt.update_each,opt.hessian_bs,opt.dense)==(10,None,20)

@pytest.mark.parametrize('kwargs', [dict(update_each=3), dict(hessian_bs=0.5), dict(dense=5)], ids=str)
def test_what_was_set_by_hand_is_left_out_where_a_schedule_was_told_otherwise(kwargs):
    old,new = Every(2, 0.25, 3),Every(**{**dict(update_each=2, hessian_bs=0.25, dense=3), **kwargs})
    old.update_each = 7
    new.load_state_dict(old.state_dict())
    assert new.update_each==kwargs.get('update_each', 2)

def test_where_no_two_steps_move_the_same_nothing_is_chosen():
    when = Budget(0.25, 12, iter(range(1000)).__next__)
    for n in range(1, 201): when.tick(n, when.part(n-1), key=n)
    assert not when.done and when.update_each==(12,2)

def test_what_a_budget_of_version_0_0_1_has_measured_is_taken():
    "It did not say what it was told; a part of the batch that was given there is not given here"
    when = Budget(0.25)
    when.load_state_dict(dict(update_each=(12,8), hessian_bs=0.5, hvp_used='reverse', done=True))
    assert (when.update_each,when.hessian_bs,when.done)==((12,8),None,True)


def test_a_dense_start_with_more_probes_does_not_pass_for_what_an_estimate_costs(capsys):
    "A step takes a second, and each probe one more: four times at the start, once in what follows"
    now = [0.]
    b = Budget(.25, clock=lambda: now[0], dense=(5,4), least_seconds=0)
    for n in range(40):
        part = b.part(n)
        now[0] += 1+(part!=0)*b.samples(n)
        b.tick(n+1, part)
    assert b.done and b.update_each[1]==4 and 'an estimate costs 1.00 steps' in capsys.readouterr().out
