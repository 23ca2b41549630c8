"Tables and pictures of a study: what each entry reaches at the learning rate that one search for all of them found"
import math

import matplotlib.pyplot as plt,pandas as pd

from adahessian_fastai.compare import mean_of_all


def best_runs(
    runs:pd.DataFrame, # One row for each run, with columns `entry`, `lr`, `seed` and `valid_loss`
)->pd.DataFrame: # Those of the rows that were made with the chosen rates
    "The runs of each entry at the rate with the lowest `valid_loss` from the first seed"
    def best(group):
        tried = group[group.seed==group.seed.min()]
        return group[group.lr==tried.lr[tried.valid_loss.fillna(math.inf).idxmin()]]
    return pd.concat([best(o) for _,o in runs.groupby('entry', sort=False)])


def shipped(
    runs:pd.DataFrame, # Rows of a `shipped_….csv`
)->pd.DataFrame: # As for `best_runs`; where no part of the data was kept for the report, it reports what it chooses by
    "The runs of `defaults.py --shipped` as those of a study"
    kept = [k for k in runs if k.startswith('rest_') and runs[k].notna().any()]
    return runs.assign(valid_loss=runs.loss, **{k.removeprefix('rest_'): runs[k] for k in kept})


def study_table(
    runs:pd.DataFrame, # As for `best_runs`, with `epochs`, `seconds` and some of `accuracy`, `chrf`, `bleu` and `loss`
)->pd.DataFrame: # One row for each entry; `time` is relative to the first one
    "Mean ± standard deviation over the seeds at each entry's best learning rate"
    best = best_runs(runs)
    groups = best.groupby('entry', sort=False)
    forms = {k: dict(accuracy='{:.1%}').get(k, '{:.3f}') for k in ('accuracy','chrf','bleu','loss') if k in best and best[k].notna().any()}
    def show(form): return lambda o: form.format(mean_of_all(o))+(f' ± {form.format(o.std())}' if len(o)>1 else '')
    columns = {k: (k,show(form)) for k,form in forms.items()}
    table = groups.agg(lr=('lr','first'), **columns, epochs=('epochs','first'), seeds=('seed','nunique'))
    seconds = groups.seconds.mean()
    return table.assign(time=(seconds/seconds.iloc[0]).round(2))


def plot_study(
    runs:pd.DataFrame, # As for `study_table`
    metric:str='accuracy', # Column to draw
    ax=None, # Axes to draw in
):
    "Mean and standard deviation of `metric` for each entry against the time that it took"
    ax = ax or plt.subplots(figsize=(6,4), layout='constrained')[1]
    for name,o in best_runs(runs).groupby('entry', sort=False):
        ax.errorbar(o.seconds.mean(), o[metric].mean(), yerr=o[metric].std() if len(o)>1 else None, fmt='o', capsize=3, label=name)
    ax.set(xlabel='CPU seconds of training', ylabel=metric)
    ax.set_xlim(left=0)
    ax.legend()
    return ax


def plot_lrs(
    runs:pd.DataFrame, # One row for each run, with columns `entry`, `lr` and `metric`
    metric:str='accuracy', # Column to draw
    ax=None, # Axes to draw in
):
    "Mean of `metric` over the learning rates of each entry, with a band from the worst to the best seed; a run without result counts as 0"
    ax = ax or plt.subplots(figsize=(6,4), layout='constrained')[1]
    for name,o in runs.fillna({metric: 0.}).groupby('entry', sort=False):
        means = o.groupby('lr')[metric].agg(['mean','min','max'])
        ax.plot(means.index, means['mean'], 'o-', label=name)
        ax.fill_between(means.index, means['min'], means['max'], alpha=0.2)
    ax.set(xscale='log', xlabel='maximal learning rate', ylabel=metric)
    ax.legend()
    return ax
