"""The page: its tables, and in words what is different and why."""

from __future__ import annotations

import difference
import peers_speed

TITLE = """# Side by side with diffusers' LCM scripts and FastGen

    {command}

{versions}

One world for both sides: a bundled tiny model, four prompts, the teacher's pictures, one noise, one set of times, in
float64. Ours is the method's own objective on its LoRAs; theirs is their own code on diffusers' network with the same
factors as peft's adapters. Compared are the loss and its gradient with respect to the student's (critic's) factors,
all of them: the quotient, the relative difference of the gradients, and what is left of it after the best factor. Our
factors' gradients are float32, so 3e-8 is equality. Rows where both agree to 1e-6 are bold.

"""

WORDS = """
## What differs, and why

**LCM (diffusers' scripts).** Their training step is part of a long main(); it was put together of the functions that
the scripts define, all five calls of the network, without `.float()` before the loss. Set alike, loss and gradient
are equal.
- *w*: theirs is D_c + w (D_c - D_u), ours D_u + w (D_c - D_u): our w is theirs plus 1. Theirs is drawn from U[3, 15]
  for each sample; ours is the run's guidance, or drawn where guidance_low and guidance_high say so.
- *Null condition*: theirs is a text of zeros, which no base was trained on; ours is the empty prompt, encoded.
- *Loss*: theirs l2 by default (huber, c = 0.001, as a choice), a mean over elements; ours huber with the same c (l2
  as a choice), a sum over a sample's elements. AdamW is blind to the factor, the clip of a gradient's norm is not.
- *The last interval*: theirs ends at time 0, whose sigma is 0.029 and not 0, so that the target is the solver's x_r
  with that noise still in it; ours ends in the picture. Ended at time 0, ours is equal there too.
- *Levels*: theirs 50, 20 indices apart; ours as many in each of the student's steps (48 for 4 steps), so that each
  level that the student is drawn at is one of them. Compared at theirs.
- *Schedule*: their cumulative product is float32, ours float64: 1e-6 of the loss.
- *Boundary scalings* (sigma_data 0.5, times by 10): the same.

**CM (ours: ect).** Equal once the width of the pseudo-Huber distance is: theirs is 1e-8, almost |a - b|, ours c =
0.00054 sqrt(d), the paper's. The map from t to r, its q and stages, the weight 1 / (t - r), the log-normal of t and
the shared noise are the same in EDM's time sigma / alpha. The teacher's step of their use_cd is our `TeacherSteps`.
- *Flow models*: theirs reads t, r and the weight in the flow's own time, ours always in sigma / alpha, as the papers
  count; unweighed they are equal. At high noise their step is the longer, from t 0.9 to 0.71, where ours is to 0.89.
- *r*: theirs never falls below min_t (0.002 in EDM's time), ours reaches 0, the picture itself, in the first stages.
- *ict* draws neighbours of a Karras grid, which FastGen has not; its distance and weight are the ones compared here.

**sCM (ours: scm).** Equal to 1e-7 with sigma_data 1, their two weights off, and the tangent exact on both sides.
- *sigma_data*: theirs 0.5, ours 1: latents have unit deviation.
- *Weights*: theirs divides by sigma_t, by the elements a second time, and by a learnt exp(logvar), whose log it adds;
  ours has none of these (the learnt one was held at 1 here). Ours is a sum over elements, theirs a mean.
- *Tangent*: theirs is torch.func.jvp by default, ours differences of 0.01 t, which need no forward mode and bear
  bfloat16 better. **On these models that is far from exact**: 0.01 t are several units of the network's time, whose
  fastest wave turns by a radian in each, so that what is measured is how the answer changes over a stretch, not at a
  point. In float32 0.001 t is within some percent; the exact one is `tangent=forward`. Exact is not better here: a run
  of scm on tiny-flow (240 updates of 4, rank 16, 64 pairs of 8 steps, rate 3e-4, ema 0.9, one seed) came from a
  distance of 0.349 to 0.276 with 0.01 t, 0.299 with 0.001 t and 0.302 with the exact one, so that 0.01 t stays.
- *Their differences* follow the noising of one picture, also under use_cd, where the teacher's direction is meant;
  ours follow the teacher's. Along the same way they are equal (last row).
- *Times*: ln(sigma / alpha) ~ N(-1, 1.4^2) with theirs, ln tan t ~ N(0.2, 1.6^2) ours, SANA-Sprint's but for its
  sigma_data.
- *Warm-up of the tangent*: 10,000 updates with theirs, a fifth of the run ours. Set to one half here.
- *Discrete schedules*: not compared: FastGen's search for a time there looks up a variance in a table of deviations
  (`AlphasNoiseSchedule.sqrt_snr_to_t`), and its times are whole indices, which have no derivative. tiny was compared
  in EDM's time.

**MeanFlow (ours: meanflow).** Equal with their loss_type l2 and norm_const 0.01, the original's, which ours are.
- *Loss*: their default opt_grad divides the tangent by its norm + 0.1 (a gradient of |g| / (|g| + 0.1)), ours |g|^2 +
  0.01.
- *r*: theirs has an embedder of its own in the network; ours is told t - r / 2, which a plain LoRA can carry. Here
  both.
- *Times*: two logit-normals on both sides (theirs N(-0.4, 1) for DiT, as ours); r = t for three quarters of the
  samples with theirs there (r_sample_ratio 0.25), for a quarter with ours, and r = 0, as every step is drawn, for
  half of them.
- *Differences*: theirs an absolute step of 1e-4, ours 0.01 t: as with scm.

**DMD2 (ours: dmd2, dmd).** Equal with theirs but for 1e-6 that they add to the normaliser where ours has a floor;
they compute it in float32.
- *Scale*: ours is a sum over elements by default (matching_scale sum), theirs a mean.
- *Critic*: our default weighs its error as one in v, theirs as one in what the network predicts: critic_weight eps or
  flow makes them equal.
- *Head*: the losses on logits are equal; the features and the head itself are others (heads of convolutions on
  several blocks' features in ours), and are not compared. Its weight is 0.001 with theirs.
- *Several steps*: theirs begins a step from a noised real picture, ours from the student's own earlier steps (DMD2's
  backward simulation). Compared with one step.
- *Turns*: theirs one student's in five by default; ours critic_updates, 3.
- *Levels*: ours U[0.02, 0.98] of the network's time, theirs by configuration.

LCM and FastGen train by other defaults beside these (RAdam, betas, running means, augmentations): not compared.
"""

SPEED = """
## Speed

A whole update of ours over one of theirs, in pairs: rank {rank}, four samples, one thread, the process' own time,
nothing recomputed, no running mean. Ours is the trainer's own step with its draw of prompts and pictures; below 1
ours is the faster. The forwards are as many on both sides. FastGen trains whole networks; here it has the same LoRAs,
by peft.

"""


def page(command: str, versions: str, rows: list[difference.Row], paces: list[peers_speed.Pace]) -> str:
    lines = [difference.HEAD, *(found.line() for found in rows)]
    text = TITLE.format(command=command, versions=versions) + "\n".join(lines) + "\n" + WORDS
    if paces:
        text += (
            SPEED.format(rank=peers_speed.RANK) + "\n".join([peers_speed.HEAD, *(pace.line() for pace in paces)]) + "\n"
        )
    return text
