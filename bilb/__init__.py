"""Multi-task learning for JAX, written the way Optax is written.

A *balancer* decides how much each of K task losses counts at a step. It is an Optax transformation
of the vector of losses. ``value_and_grad`` computes what it reads and then takes one backward pass
of the weighted sum::

    task_losses = lambda params, *batch: ...                         # the K losses, stacked
    balancer = bilb.chain(bilb.log_losses(), bilb.bilb4mtl())
    value_and_grad = bilb.value_and_grad(task_losses, balancer)
    state = value_and_grad.init(params, *batch)
    losses, grads, state = value_and_grad(params, state, *batch)     # grads go to any optimiser

``losses`` are those of ``task_losses``, and ``state.effective_weights`` the weights that they got.
A task that is absent from a batch: ``value_and_grad(params, state, *batch, mask=mask)``. ``help``
of each name says formula, arguments with shapes and defaults, errors, an example and the source.

Drivers
    value_and_grad                  weighs the losses before one backward pass
    representation_value_and_grad   the same, task gradients taken at a shared representation
    aggregate_by                    weighs task gradients, as the first link of an optimiser's chain
    task_gradients, linearize       the derivatives alone, for a loop of your own
    names                           losses in a dict: what is given and returned by task name

Normalisations, links in front of a method; chain joins links
    log_losses, power_losses, divide_by, scale_by_initial_loss, scale_by_initial_ratio,
    log_scale_by_initial_loss, pmean_losses
    skip_nonfinite                  wraps a balancer: a loss that is not finite counts as absent

The methods by what they read, the cheapest first. Rung 1, the losses: no extra cost
    bilb4mtl (with routers, discrepancies), igb_v1, igb_v2, linear_scalarization, rlw, dwa,
    uncertainty_weighting, imtl_l, geometric_mean, stch, stch_nadir, pbi, cosmos, softadapt,
    relobralo, self_adaptive

Rung 2, also how the losses change along the step: one forward pass more
    marigold (with lower_levels, adagrad_norm; slopes has the ways to take them), famo (for which
    value_and_grad.after is called after the optimiser's step)

Rung 3, the Gram matrix of the task gradients, or their norms: K backward passes, or one forward
pass for an estimate (grams has the ways to take it)
    mgda, upgrad, dualproj, cagrad, nash_mtl, fairgrad, pcgrad, gradvac, imtl_g, aligned_mtl,
    config (ConFIG, the method), sdmgrad, modo, pcd, krum, gradnorm, lr_annealing, db_pinn,
    ntk_weights (reads curvatures); cr_mogm smooths the weights of any method

Rung 4, the task gradients themselves: first link of an optimiser's chain, as aggregate_by
    graddrop, moco, db_mtl, excess_mtl, trimmed_mean

Whole training steps, which evaluate the model themselves (TrainingStep)
    bilb4mtl_double_loop; with validation data auto_lambda, moml, forum

Also
    presets                         the papers' experiments as ready chains
    metrics, plots                  what came out of a run, in numbers and figures
    loss_transformation             a method of your own; Router, a router of your own
    MissingArgument                 raised where a method cannot work without an argument

The states are NamedTuples named after what they belong to (BiLB4MTLState, ValueAndGradState), or
after what several methods share (GramState).
"""

from bilb import curvatures as curvatures
from bilb import grams as grams
from bilb import metrics as metrics
from bilb import names as names
from bilb import plots as plots
from bilb import presets as presets
from bilb import slopes as slopes
from bilb.aggregation import AggregateByState as AggregateByState
from bilb.aggregation import aggregate_by as aggregate_by
from bilb.arguments import MissingArgument as MissingArgument
from bilb.base import TrainingStep as TrainingStep
from bilb.base import loss_transformation as loss_transformation
from bilb.bilevel import discrepancies as discrepancies
from bilb.bilevel import lower_levels as lower_levels
from bilb.bilevel import routers as routers
from bilb.bilevel.bilb4mtl import BiLB4MTLState as BiLB4MTLState
from bilb.bilevel.bilb4mtl import bilb4mtl as bilb4mtl
from bilb.bilevel.marigold import AdagradNormState as AdagradNormState
from bilb.bilevel.marigold import MarigoldState as MarigoldState
from bilb.bilevel.marigold import adagrad_norm as adagrad_norm
from bilb.bilevel.marigold import marigold as marigold
from bilb.bilevel.routers import Router as Router
from bilb.chain import ChainState as ChainState
from bilb.chain import chain as chain
from bilb.gradient_balancing.aggregators.db_mtl import DBMTLState as DBMTLState
from bilb.gradient_balancing.aggregators.db_mtl import db_mtl as db_mtl
from bilb.gradient_balancing.aggregators.excess_mtl import ExcessMTLState as ExcessMTLState
from bilb.gradient_balancing.aggregators.excess_mtl import excess_mtl as excess_mtl
from bilb.gradient_balancing.aggregators.graddrop import GradDropState as GradDropState
from bilb.gradient_balancing.aggregators.graddrop import graddrop as graddrop
from bilb.gradient_balancing.aggregators.moco import MoCoState as MoCoState
from bilb.gradient_balancing.aggregators.moco import moco as moco
from bilb.gradient_balancing.aggregators.trimmed_mean import trimmed_mean as trimmed_mean
from bilb.gradient_balancing.aligned_mtl import aligned_mtl as aligned_mtl
from bilb.gradient_balancing.cagrad import cagrad as cagrad
from bilb.gradient_balancing.config import config as config
from bilb.gradient_balancing.cr_mogm import CRMOGMState as CRMOGMState
from bilb.gradient_balancing.cr_mogm import cr_mogm as cr_mogm
from bilb.gradient_balancing.db_pinn import DBPINNState as DBPINNState
from bilb.gradient_balancing.db_pinn import db_pinn as db_pinn
from bilb.gradient_balancing.dualproj import dualproj as dualproj
from bilb.gradient_balancing.fairgrad import fairgrad as fairgrad
from bilb.gradient_balancing.gradnorm import GradNormState as GradNormState
from bilb.gradient_balancing.gradnorm import gradnorm as gradnorm
from bilb.gradient_balancing.gradvac import gradvac as gradvac
from bilb.gradient_balancing.imtl_g import imtl_g as imtl_g
from bilb.gradient_balancing.inverse import InverseWeightsState as InverseWeightsState
from bilb.gradient_balancing.krum import krum as krum
from bilb.gradient_balancing.lr_annealing import lr_annealing as lr_annealing
from bilb.gradient_balancing.mgda import mgda as mgda
from bilb.gradient_balancing.modo import modo as modo
from bilb.gradient_balancing.nash_mtl import nash_mtl as nash_mtl
from bilb.gradient_balancing.ntk_weights import ntk_weights as ntk_weights
from bilb.gradient_balancing.pcd import pcd as pcd
from bilb.gradient_balancing.pcgrad import pcgrad as pcgrad
from bilb.gradient_balancing.sdmgrad import sdmgrad as sdmgrad
from bilb.gradient_balancing.upgrad import upgrad as upgrad
from bilb.gradient_balancing.weighting import GramState as GramState
from bilb.improvable_gap.igb_v1 import IGBv1State as IGBv1State
from bilb.improvable_gap.igb_v1 import igb_v1 as igb_v1
from bilb.improvable_gap.igb_v2 import IGBv2State as IGBv2State
from bilb.improvable_gap.igb_v2 import igb_v2 as igb_v2
from bilb.jacobian import linearize as linearize
from bilb.jacobian import task_gradients as task_gradients
from bilb.loss_balancing.cosmos import COSMOSState as COSMOSState
from bilb.loss_balancing.cosmos import cosmos as cosmos
from bilb.loss_balancing.dwa import DWAState as DWAState
from bilb.loss_balancing.dwa import SlidingDWAState as SlidingDWAState
from bilb.loss_balancing.dwa import dwa as dwa
from bilb.loss_balancing.famo import FAMOState as FAMOState
from bilb.loss_balancing.famo import famo as famo
from bilb.loss_balancing.geometric_mean import GeometricMeanState as GeometricMeanState
from bilb.loss_balancing.geometric_mean import geometric_mean as geometric_mean
from bilb.loss_balancing.imtl_l import IMTLLState as IMTLLState
from bilb.loss_balancing.imtl_l import imtl_l as imtl_l
from bilb.loss_balancing.linear_scalarization import (
    LinearScalarizationState as LinearScalarizationState,
)
from bilb.loss_balancing.linear_scalarization import linear_scalarization as linear_scalarization
from bilb.loss_balancing.pbi import PBIState as PBIState
from bilb.loss_balancing.pbi import pbi as pbi
from bilb.loss_balancing.relobralo import ReLoBRaLoState as ReLoBRaLoState
from bilb.loss_balancing.relobralo import relobralo as relobralo
from bilb.loss_balancing.rlw import RLWState as RLWState
from bilb.loss_balancing.rlw import rlw as rlw
from bilb.loss_balancing.self_adaptive import SelfAdaptiveState as SelfAdaptiveState
from bilb.loss_balancing.self_adaptive import self_adaptive as self_adaptive
from bilb.loss_balancing.softadapt import SoftAdaptState as SoftAdaptState
from bilb.loss_balancing.softadapt import softadapt as softadapt
from bilb.loss_balancing.stch import STCHNadirState as STCHNadirState
from bilb.loss_balancing.stch import STCHState as STCHState
from bilb.loss_balancing.stch import stch as stch
from bilb.loss_balancing.stch import stch_nadir as stch_nadir
from bilb.loss_balancing.uncertainty_weighting import (
    UncertaintyWeightingState as UncertaintyWeightingState,
)
from bilb.loss_balancing.uncertainty_weighting import (
    uncertainty_weighting as uncertainty_weighting,
)
from bilb.normalize import InitialLossState as InitialLossState
from bilb.normalize import LogScaleByInitialLossState as LogScaleByInitialLossState
from bilb.normalize import divide_by as divide_by
from bilb.normalize import log_losses as log_losses
from bilb.normalize import log_scale_by_initial_loss as log_scale_by_initial_loss
from bilb.normalize import pmean_losses as pmean_losses
from bilb.normalize import power_losses as power_losses
from bilb.normalize import scale_by_initial_loss as scale_by_initial_loss
from bilb.normalize import scale_by_initial_ratio as scale_by_initial_ratio
from bilb.normalize import skip_nonfinite as skip_nonfinite
from bilb.representation import representation_value_and_grad as representation_value_and_grad
from bilb.training import ValueAndGradState as ValueAndGradState
from bilb.training import value_and_grad as value_and_grad
from bilb.training_steps.auto_lambda import AutoLambdaState as AutoLambdaState
from bilb.training_steps.auto_lambda import auto_lambda as auto_lambda
from bilb.training_steps.double_loop import DoubleLoopState as DoubleLoopState
from bilb.training_steps.double_loop import bilb4mtl_double_loop as bilb4mtl_double_loop
from bilb.training_steps.forum import FORUMState as FORUMState
from bilb.training_steps.forum import forum as forum
from bilb.training_steps.moml import MOMLState as MOMLState
from bilb.training_steps.moml import moml as moml

__version__ = "0.2.0"
