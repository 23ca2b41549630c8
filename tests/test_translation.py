"Translation: masks, padding, tied words, decoding against brute force and recomputation, loss against a plain loop, batches, training"
import gzip,itertools,math,random,re
from functools import partial
import pytest,torch
from fastai.basics import Adam,set_seed
from fastai.callback.schedule import *
from torch.nn.utils.rnn import pad_sequence
import adahessian_fastai.translation as translation
from adahessian_fastai.adahessian import adahessian_paper as adahessian
from adahessian_fastai.hessian_free import hessian_free
from adahessian_fastai.translation import *
from adahessian_fastai.translation import bos,eos,pad,unk

ROUNDING = 1e-10  # float64 sums in another order
SINGLE = 1e-6     # fastai's losses compute in float32

def model(n_src=9, n_tgt=7, seed=0, **kwargs):
    "A small model in float64, without dropout"
    set_seed(seed)
    return TranslationTransformer(n_src, n_tgt, **{**dict(d=8, heads=2, ff=12), **kwargs}).double().eval()

def sources(n=5, longest=6, n_src=9, seed=0):
    "Sentences of several lengths"
    rng = random.Random(seed)
    return [torch.tensor([rng.randrange(4, n_src) for _ in range(rng.randrange(1, longest))]+[eos]) for _ in range(n)]

def batch(sents): return pad_sequence(sents, batch_first=True, padding_value=pad)

def log_probability(m, src, ids):
    "Of one sentence by teacher forcing, up to and with its end"
    ids = [*itertools.takewhile(lambda i: i!=eos, ids), *[eos]*(eos in ids)]
    logp = m(src[None], torch.tensor([[bos, *ids[:-1]]]))[0].log_softmax(-1)
    return logp[range(len(ids)),ids].sum().item(),len(ids)

def close(a, b, eps=ROUNDING): return (a-b).abs().max()<eps


# Model

@torch.no_grad()
@pytest.mark.parametrize('act', ['gelu','relu'])
def test_later_words_change_nothing_earlier(act):
    m,src = model(act=act),batch(sources())
    tgt = torch.randint(4, 7, (5,6))
    other = torch.cat([tgt[:,:3], torch.randint(4, 7, (5,3))], 1)
    z,z_other = m(src, tgt),m(src, other)
    assert close(z[:,:3], z_other[:,:3]) and not close(z[:,3:], z_other[:,3:])

def test_padding_changes_neither_logits_nor_loss_nor_gradient():
    m,src,loss = model(),batch(sources()),translation_loss()
    tgt = torch.randint(4, 7, (5,6))
    grow = lambda x,n: torch.cat([x, x.new_full((len(x),n), pad)], 1)
    params,res = list(m.parameters()),[]
    for n in (0,3):
        z = m(grow(src,n), grow(tgt[:,:-1],n))
        l = loss(z, grow(tgt[:,1:],n))
        res.append([z[:,:5], l, *torch.autograd.grad(l, params)])
    assert close(res[0][0], res[1][0]) and all(close(a,b,SINGLE) for a,b in zip(*res))

@torch.no_grad()
def test_no_sentence_sees_its_neighbour():
    m,src = model(),batch(sources())
    tgt = torch.randint(4, 7, (5,4))
    alone = torch.cat([m(s[s!=pad][None], t[None]) for s,t in zip(src,tgt)])
    assert close(m(src, tgt), alone)

@torch.no_grad()
def test_order_of_words_matters():
    m,tgt = model(),torch.tensor([[bos,4,5]])
    assert not close(m(torch.tensor([[4,5,eos]]), tgt), m(torch.tensor([[5,4,eos]]), tgt))

def test_output_and_target_words_share_one_matrix():
    m,src = model(),batch(sources())
    assert sum(p.shape==(7,8) for p in m.parameters())==1
    z = m(src, torch.tensor([[bos,4]]*5))
    with torch.no_grad(): m.tgt_emb.weight[6] *= 2
    doubled = m(src, torch.tensor([[bos,4]]*5))
    assert close(doubled[...,6], 2*z[...,6]) and close(doubled[...,:6], z[...,:6])
    grad, = torch.autograd.grad(doubled[...,5].sum(), [m.tgt_emb.weight])
    assert (grad.abs().sum(1)>0).tolist()==[i in (bos,4,5) for i in range(7)]

def test_arguments_change_the_model():
    n = lambda **kwargs: sum(p.numel() for p in model(**kwargs).parameters())
    assert len({n(), n(d=16), n(ff=16), n(n_layers=1), n(n_src=10)})==5
    with torch.no_grad(): outs = [model(**o)(torch.tensor([[4,eos]]), torch.tensor([[bos]])) for o in (dict(),dict(act='relu'),dict(heads=1))]
    assert not close(outs[0], outs[1]) and not close(outs[0], outs[2])
    m = model(dropout=.5).train()
    assert not close(*(m(torch.tensor([[4,eos]]), torch.tensor([[bos]])) for _ in range(2)))
    with pytest.raises(ValueError, match='3 words.*max_len=2'): model(max_len=2)(torch.tensor([[4,5,eos]]), torch.tensor([[bos]]))
    with pytest.raises(ValueError, match='d=10, heads=4'): TranslationTransformer(9, 7, d=10, heads=4)


# Loss

@pytest.mark.parametrize('smoothing', [0.,.1])
def test_loss_equals_a_plain_loop(smoothing):
    torch.manual_seed(0)
    z,y = torch.randn(3, 5, 7, dtype=torch.float64),torch.randint(0, 7, (3,5))
    y[0,2:] = y[2,4:] = pad
    total,n,right = 0.,0,0
    for zs,ys in zip(z,y):
        for logits,word in zip(zs,ys):
            if word==pad: continue
            logp = [v-math.log(sum(math.exp(o) for o in logits.tolist())) for v in logits.tolist()]
            total -= (1-smoothing)*logp[word] + smoothing*sum(logp)/7
            n,right = n+1,right+(max(range(7), key=lambda i: logits[i])==word)
    assert abs(translation_loss(smoothing)(z, y).item()-total/n)<SINGLE
    assert abs(word_accuracy(z, y).item()-right/n)<SINGLE


# Decoding

@torch.no_grad()
def test_each_word_is_the_likeliest_by_teacher_forcing():
    m,src = model(n_tgt=6, seed=2),batch(sources(8))
    for s,ids in zip(src, greedy_decode(m, src, max_len=4).tolist()):
        said = list(itertools.takewhile(lambda i: i!=pad, ids))
        for t,word in enumerate(said): assert word==max((eos,4,5), key=lambda w: log_probability(m, s[s!=pad], said[:t]+[w])[0])

class Script(torch.nn.Module):
    "Says the source, word by word, and then ends"
    def __init__(self, n=9):
        super().__init__()
        self.n,self.seen,self.pos = n,[],torch.zeros(1)
    def encode(self, src): return src
    def decode(self, tgt_in, memory, src):
        self.seen.append(tgt_in.shape[1])
        return torch.nn.functional.one_hot(memory[:,:tgt_in.shape[1]], self.n).float()*20
    def head(self, h): return h

def test_decoding_stops_at_the_end():
    src,m = torch.tensor([[4,eos,5,5], [4,5,eos,6]]),Script()
    assert greedy_decode(m, src, max_len=4).tolist()==[[4,eos,pad],[4,5,eos]] and m.seen==[1,2,3]
    assert greedy_decode(Script(), src, max_len=2).tolist()==[[4,eos],[4,5]]

@torch.no_grad()
def test_what_is_never_said():
    m,src = model(),batch(sources(10))
    m.tgt_emb.weight[[unk,pad,bos]] *= 50
    for o in greedy_decode(m, src).tolist():
        n = o.index(eos) if eos in o else len(o)
        assert {unk,pad,bos}.isdisjoint(o[:n]) and set(o[n+1:])<={pad}


# Data

def test_stand_in_is_reproducible_and_its_parts_differ():
    train,valid = (sentence_pairs('toy', o, 50) for o in ('train','valid'))
    assert sentence_pairs('toy', n=0)==[] and train==sentence_pairs('toy', 'train', 50) and train==sentence_pairs('toy', 'train', 60)[:50] and train!=valid
    with pytest.raises(ValueError, match="split='dev'"): sentence_pairs('toy', 'dev')
    with pytest.raises(ValueError, match="data='europarl'"): sentence_pairs('europarl')

def test_files_are_read_and_only_missing_ones_are_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv('FASTAI_HOME', str(tmp_path))
    loaded = []
    def urlsave(url, dest):
        loaded.append(url)
        dest.write_bytes(gzip.compress('Ein Hund.\u2028Ja.\nZwei Männer.\n'.encode()))
    monkeypatch.setattr(translation, 'urlsave', urlsave)
    assert not has_multi30k()
    for _ in range(2): pairs = sentence_pairs('multi30k', 'test')
    assert pairs==[('Ein Hund.\u2028Ja.',)*2, ('Zwei Männer.',)*2]
    assert [o.rpartition('/')[2] for o in loaded]==['test_2016_flickr.en.gz','test_2016_flickr.de.gz']
    for o in ('train','valid'): sentence_pairs('multi30k', o)
    assert has_multi30k() and len(loaded)==6 and not [*multi30k_path().glob('*.part')]

def test_vocab():
    v = Vocab(["Zwei Hunde, zwei Katzen.", "hunde!"], min_freq=2)
    assert v.words==[*translation.specials, 'hunde', 'zwei'] and len(v)==6
    assert v.encode('Zwei rote Hunde')==[5,unk,4] and v.decode([bos,5,4,eos,pad,pad])=='zwei hunde'
    assert Vocab(['ab, cd.'], 1).decode(Vocab(['ab, cd.'], 1).encode('AB, cd.'))=='ab, cd.'

def test_batches():
    pairs = sentence_pairs('toy', 'train', 100)+[('the '*20,'das '*20)]
    dls = translation_dls(pairs, pairs[:30], n_train=90, max_len=10, bs=16)
    assert (len(dls.train_ds),len(dls.valid_ds))==(90,30) and (len(dls.train),len(dls.valid))==(5,2)
    seen = []
    for src,tgt_in,tgt_out in dls.train:
        assert src.dtype==torch.int64 and len(src)==16 and tgt_in.shape==tgt_out.shape
        for s,i,o in zip(src.tolist(), tgt_in.tolist(), tgt_out.tolist()):
            n = o.index(eos)
            assert i[0]==bos and i[1:n+1]==o[:n] and set(o[n+1:])|set(i[n+1:])<={pad} and set(s[s.index(eos)+1:])<={pad}
        seen += [dls.tgt_vocab.decode(o) for o in tgt_out]
    assert len(set(seen))>60
    lens = [len(o[0]) for o in dls.valid.dataset]
    assert [int((s!=pad).sum()) for b in dls.valid for s in b[0]]==sorted(lens, reverse=True)
    with pytest.raises(ValueError, match='max_len=3'): translation_dls(pairs, pairs, max_len=3)
    assert len(translation_dls(pairs, pairs, min_freq=1000).src_vocab)==len(translation.specials)


# Training

@pytest.fixture(scope='module')
def dls(): return translation_dls(sentence_pairs('toy', 'train', 1000), sentence_pairs('toy', 'valid', 40), bs=32)

def learner(dls, opt_func, **kwargs):
    set_seed(0)
    return translation_learner(dls, opt_func, **{**dict(d=32, heads=2, n_layers=1, dropout=0.), **kwargs})

OPTS = dict(adam=(Adam,1e-2), adahessian=(adahessian,.15), every_third=(partial(adahessian, update_each=3),.15),
    gnb=(partial(adahessian, estimator='gnb', eps=1e-2),.15))

@pytest.mark.parametrize('name', OPTS)
def test_learns_the_stand_in(dls, name):
    pytest.importorskip('sacrebleu')
    opt_func,lr = OPTS[name]
    learn = learner(dls, opt_func)
    with learn.no_bar(),learn.no_logging(): learn.fit_one_cycle(5, lr)
    en,de = zip(*sentence_pairs('toy', 'test', 40))
    assert bleu_chrf(translate(learn, en, max_len=12), de)['chrf']>90

def test_fused_attention_with_dropout(dls):
    learn = learner(dls, adahessian, dropout=.1)
    before = learn.validate()[0]
    with learn.no_bar(),learn.no_logging(): learn.fit(1, .15)
    assert learn.validate()[0]<before-1

def test_hessian_free():
    pairs = sentence_pairs('toy', 'train', 64)
    learn = learner(translation_dls(pairs, pairs, bs=64), hessian_free, d=16)
    before = learn.validate()[0]
    with learn.no_bar(),learn.no_logging(): learn.fit(3)
    assert learn.validate()[0]<before-1

def test_translations_keep_order_and_do_not_depend_on_the_batch(dls):
    learn = learner(dls, Adam)
    with learn.no_bar(),learn.no_logging(): learn.fit_one_cycle(1, 1e-2)
    sents = [o[0] for o in sentence_pairs('toy', 'test', 15)]+['dog', 'the old dog', 'nothing known here']
    got = translate(learn, sents, bs=4, max_len=12)
    assert got==[translate(learn, [o], max_len=12)[0] for o in sents] and len(set(got))>3


# Scores

def test_scores():
    pytest.importorskip('sacrebleu')
    refs = [o[1] for o in sentence_pairs('toy', 'test', 5)]
    assert bleu_chrf([o.lower() for o in refs], refs)==pytest.approx(dict(bleu=100, chrf=100))
    assert bleu_chrf(refs[1:]+refs[:1], refs)['bleu']<60
    with pytest.raises(ValueError, match='len.hyps.=4'): bleu_chrf(refs[1:], refs)

def test_missing_sacrebleu_names_the_remedy(monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'sacrebleu.metrics', None)
    with pytest.raises(ImportError, match='pip install'): bleu_chrf(['a'], ['a'])

def test_a_batch_larger_than_the_data_is_named():
    "No step would be made"
    with pytest.raises(ValueError, match='bs must be at most 50, the number of pairs'):
        translation_dls(sentence_pairs('toy','train',50), sentence_pairs('toy','valid',20))

def test_the_longest_sentence_has_as_many_words_as_was_said():
    "In both languages"
    pairs = [('a b c','x y z'), ('a b c d','x'), ('a','x y z w')]*2
    dls = translation_dls(pairs, pairs, max_len=3, bs=2, min_freq=1, device='cpu')
    assert len(dls.train.dataset)==len(dls.valid.dataset)==2 and dls.tgt_vocab.words[4:]==['x','y','z']

def test_a_padded_sentence_without_its_end_has_no_padding():
    v = Vocab(['a b'], min_freq=1)
    a,b = v.encode('a b')
    assert v.decode([bos,a,pad,b,pad])==v.decode([a,b,eos,a,pad])=='a b'

def test_adjectives_of_the_stand_in_agree_with_their_articles():
    "As objects: den alten, and das alte, die alte"
    targets = [o[1] for o in sentence_pairs('toy', n=300)]
    for article,right,wrong in (('den','en','e'), ('das','e','en'), ('die','e','en')):
        assert any(re.search(rf' {article} \w+{right} ', o) for o in targets) and not any(re.search(rf' {article} \w+{wrong} ', o) for o in targets)

def test_positions_are_the_waves_of_the_paper():
    "Sine and cosine of t/10000^(2i/d) in turn (Vaswani et al. 2017, section 3.5)"
    d,pos = 8,TranslationTransformer(5, 5, d=8, heads=2, max_len=20).pos
    want = [[f(t/10000**(2*i/d)) for i in range(d//2) for f in (math.sin,math.cos)] for t in range(20)]
    assert torch.allclose(pos, torch.tensor(want), atol=1e-5)
