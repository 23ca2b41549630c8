"One of the two processes of `variants.train_on_ranks`: trains every case that has ranks, and writes down what it ended with"
import sys
import torch,torch.distributed as dist
from fastai.distributed import DistributedTrainer
from torch.nn.parallel import DistributedDataParallel
from variants import chosen,fit,train

# fastai's loaders broadcast CUDA tensors; every rank has its own data here
DistributedTrainer._wrap_dl = lambda self,dl: dl
DistributedDataParallel._passing_sync_batchnorm_handle = lambda self,module: None


def on_a_rank(make, lr):
    learn = make()
    with learn.distrib_ctx(sync_bn=False, cpu=True): return fit(learn, 2, lr)


def main(folder, rank, k):
    found = {}
    for n,c in chosen(k, 2).items():
        c.way = on_a_rank
        found[n] = train(c, rank)
    torch.save(found, f'{folder}/{rank}.pt')


if __name__=='__main__':
    torch.set_num_threads(1)
    rank = int(sys.argv[2])
    dist.init_process_group('gloo', rank=rank, world_size=2)
    main(sys.argv[1], rank, sys.argv[3])
    dist.destroy_process_group()
