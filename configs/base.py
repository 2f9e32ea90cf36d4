"""Every field of a config, with the defaults that the recipes start from.

The networks' defaults are the published ones; recipes shrink them.
"""

from ml_collections import ConfigDict


def base_config() -> ConfigDict:
  """One comment per field; `configs/*.py` change what they need."""
  return ConfigDict(
    dict(
      seed=0,  # of parameters, noise, shuffling and synthetic cases
      data=dict(
        source="",  # directory of npz files and data_summary.csv, or 'phantom'
        directory="",  # prepared data; '' = <workdir>/data
        crop=(),  # rows, columns of the image's centre to use; () = all of it
        size=(256, 256),  # rows, columns that it is resized to
        num_points=512,  # points per cloud
        split="use",  # the csv's column, or a file listing training cases
        attribute="race",  # sensitive attribute, or several: 'race+gender'
        min_cases=0,  # groups with fewer training cases become one, 'Other'
        pooled=(),  # names of those groups, found when the run starts
        augment=True,  # quarter turns, flips, rotations by up to 20 degrees
        phantom=dict(
          train=100,  # training cases, in Harvard-FairSeg's proportions
          balanced=False,  # as many of every group instead
          test=150,  # test cases of every group
          seed=0,  # of the training phantoms
          test_seed=0,  # of the test phantoms
        ),
      ),
      points=dict(
        num_points=512,  # points per generated cloud
        latent_dim=256,  # size of the shape latent
        encoder_widths=(128, 128, 256, 512),  # shared per-point layers
        head_widths=(256, 128),  # posterior's mean and variance heads
        flow_depth=14,  # coupling layers of the prior
        flow_width=256,  # width of a coupling net
        decoder_widths=(128, 256, 512, 256, 128),  # pointwise denoiser
        num_steps=100,  # diffusion steps T
        beta_start=1e-4,  # linear schedule
        beta_end=0.02,
        kl_weight=1e-4,  # of the posterior against the prior
      ),
      image=dict(
        network="unet",  # in pixel space, or 'stable_diffusion' in latents
        weights="",  # directory of stable_diffusion's networks and prompts
        stable_diffusion=dict(  # sizes; the defaults are version 1.5's
          block_out_channels=(320, 640, 1280, 1280),  # per level
          layers_per_block=2,  # residual blocks per level
          attention_head_dim=8,  # heads of every attention
          cross_attention_dim=768,  # of the prompt's tokens
          norm_num_groups=32,  # of group normalisations
          hint_channels=(16, 32, 96, 256),  # of the ControlNet's hint stem
          latent_channels=4,
          autoencoder_channels=(128, 256, 512, 512),  # per level
          autoencoder_layers=2,  # residual blocks per level
        ),
        unet="unlocked",  # or 'decoder', 'locked': what learns of it
        cache_latents=False,  # encode training images once, not augmented
        only_mid_control=False,  # the ControlNet steers the middle alone
        dtype="float32",  # or 'bfloat16', of stable_diffusion's computation
        remat=False,  # compute its blocks again in the backward pass
        conditioning="controlnet",  # or 'concat': the hint as input channels
        channels=(64, 96),  # per level
        num_blocks=1,  # residual blocks per level
        attention=(False, True),  # which levels attend
        num_heads=4,  # of attention
        patch=4,  # space-to-depth factor at the input
        head_channels=32,  # of the head at twice the folded resolution
        hint_channels=(32,),  # of the ControlNet's hint stem
        intensity_prior=True,  # diffuse the residual to class intensities
        schedule="cosine",  # or 'linear', 'scaled_linear'
        num_steps=1000,  # diffusion steps T
        beta_start=1e-4,  # of linear schedules
        beta_end=0.02,
        prediction="v",  # or 'eps', 'x0'
        min_snr=0.0,  # gamma of Min-SNR's weight; 0 = none
        dropout=0.1,  # of the condition, for guidance
        sample_steps=20,  # sampling steps
        solver="ddim",  # or 'dpm++2m', which has no eta
        spacing="even",  # of sampling times; or 'leading', 'linspace'
        eta=1.0,  # 1 = ancestral, 0 = DDIM
        guidance=1.0,  # classifier-free guidance; 1 = none
      ),
      segmenter=dict(
        network="small_unet",  # or 'samed', 'transunet'
        weights="",  # to start from: a SAM, a ViT (.npz) or TransUNet (.pth)
        channels=(16, 32, 48),  # per level of the small U-Net
        patch=2,  # space-to-depth factor at its input
        image_size=512,  # side of the images of the other two
        samed=dict(
          rank=4,  # of the changes to queries and values
          embed_dim=768,  # channels of the image encoder; these are ViT-B's
          depth=12,  # its blocks
          num_heads=12,
          global_blocks=(2, 5, 8, 11),  # blocks that attend to all positions
          window=14,  # side of the others' windows
          decoder_dim=256,  # channels of the mask decoder
          decoder_depth=2,  # its blocks
          decoder_heads=8,
          decoder_mlp_dim=2048,
        ),
        transunet=dict(
          stages=(3, 4, 9),  # units of the ResNet's stages; () for none
          width=64,  # of its first convolution
          hidden_dim=768,  # channels of the transformer; these are ViT-B's
          mlp_dim=3072,
          num_heads=12,
          num_layers=12,
          decoder_channels=(512, 256, 128, 64, 16),
          dropout_rate=0.0,
        ),
        cross_entropy_weight=0.5,
        dice_weight=0.5,
      ),
      objective=dict(
        points=1.0,  # weight of the mask generator's risk
        image=1.0,  # weight of the image generator's risk
        segmenter=1.0,  # weight of the segmenter's empirical risk
        agreement=0.0,  # weight of: the denoised image must show its mask
      ),
      fairness=dict(
        method="erm",  # or 'variance', 'gap', 'worst', 'equity', 'mmd',
        # 'group_dro', 'febs', 'febs_published', 'adversarial'
        weight=1.0,  # lambda
        temperature=0.1,  # tau of 'worst'
        step_size=0.01,  # eta of 'group_dro'
        adjustment=0.0,  # C of 'group_dro'
        gamma=1.0,  # exponent of 'febs'
        adversary_width=64,  # hidden units of 'adversarial'
        decay=0.9,  # of the groups' running risks
        fill_absent=False,  # running risks stand in for absent groups
        strategy="equal_scale",  # or 'repeat_sample', 'none'
        real_share=0.5,  # least real share of each group; 0 = as published
        tilt=0.0,  # of quotas to groups of high risk: share ~ risk^tilt
        group_size=0,  # N, cases per group; 0 = as many as the largest has
      ),
      bank=dict(
        every=500,  # steps between refills from the averaged parameters
        batch_size=64,  # cases generated at a time
        harmonics=0,  # of the smooth curve fitted to each contour; 0 = as drawn
        min_solidity=0.9,  # masks less convex than this are drawn again
        max_attempts=10,  # draws of a mask before giving up
      ),
      train=dict(
        steps=10_000,  # in all
        generation_batch=16,  # real cases that teach the generators
        segmentation_batch=16,  # cases of the mixture for the segmenter
        generation_power=0.75,  # generators see group g as n_g^-power
        points=(0, 10_000),  # steps from, to in which phi is active
        image=(0, 10_000),  # likewise psi
        segmenter=(0, 10_000),  # likewise theta
        ema_decay=0.995,  # of the parameters that sample and predict
      ),
      optimizer=dict(
        points=_optimizer(2e-3),
        image=_optimizer(2e-3),
        segmenter=_optimizer(2e-3),
        adversary=_optimizer(2e-3),
      ),
      parallel=dict(
        compile="jit",  # or 'pmap', the compatibility switch
        fsdp=1,  # devices that share one copy of the parameters
        rules=(("(params|ema|opt_state)/.*", "fsdp"),),  # (pattern, rule)
      ),
      checkpoint=dict(
        every=500,  # steps between checkpoints
        keep=2,  # newest checkpoints kept
      ),
      log=dict(every=20),  # steps between log lines
      baseline=True,  # also train the segmenter alone, on real data (ERM)
      evaluation=dict(
        batch_size=64,  # test cases predicted at a time
        empty="exclude",  # or 'published': what an absent structure counts
        equity="fairdiff_std",  # or 'fairseg_sum', 'population_std'
        synthetic_per_group=64,  # synthetic cases checked in the report
      ),
    )
  )


def shrink_points(config: ConfigDict):
  """A mask generator that learns in a thousand steps on a CPU."""
  config.data.num_points = config.points.num_points = 128
  config.points.latent_dim = 32
  config.points.encoder_widths = (64, 64, 128, 128)
  config.points.head_widths = (64, 64)
  config.points.flow_depth = 6
  config.points.flow_width = 64
  config.points.decoder_widths = (64, 128, 128, 64)
  config.points.kl_weight = 2e-3  # so that few steps fit the prior
  config.optimizer.points.learning_rate = 4e-3
  config.bank.harmonics = 2


def _optimizer(learning_rate):
  return dict(
    kind="adamw",  # or 'sgd', with momentum 0.9
    learning_rate=learning_rate,  # peak
    decay="cosine",  # to 0; or 'poly' (power 0.9), 'constant'
    warmup_steps=50,
    weight_decay=1e-4,
    clip_norm=1.0,  # of the network's gradient; 0 = none
    accumulate=1,  # steps whose gradients make one update
  )
