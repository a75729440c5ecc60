import resource
from dataclasses import replace

import pytest
import torch

from cfld.config import PARTS, PRESETS
from cfld.guidance import STRATEGIES, guide, guided_prediction
from cfld.model import CFLD
from cfld.objective import TrainingBatch, draw_rows

MAX_RSS_KB = 20 * 2**20


@pytest.mark.slow
def test_paper_trains_and_samples_on_a_cpu():
    paper = PRESETS["paper"]
    config = replace(
        paper,
        source_encoder=replace(paper.source_encoder, image_size=(64, 64)),
        gradient_checkpointing=PARTS,
    )
    torch.manual_seed(0)
    model = CFLD(config, pretrained=False).to(torch.bfloat16)
    batch = TrainingBatch(
        source=torch.rand(1, 3, 64, 64) * 2 - 1,
        pose_maps=torch.rand(2, 21, 64, 64),
        latents=torch.randn(2, 4, 16, 16),
        draws=draw_rows([torch.Generator().manual_seed(0)], (4, 16, 16)),
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-4)
    losses = model(batch)
    losses.mean.backward()
    optimizer.step()
    assert losses.rows.isfinite().all()

    with torch.no_grad():
        conditioning = model.condition(batch.source, batch.pose_maps[:1])
        guided = guide(model, conditioning, STRATEGIES["cumulative"])
        latents = torch.randn(1, 4, 16, 16)
        model.scheduler.set_timesteps(2)
        for timestep in model.scheduler.timesteps:
            noise = guided_prediction(model, latents, timestep, guided)
            latents = model.scheduler.step(noise, timestep, latents).prev_sample
    assert latents.isfinite().all()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < MAX_RSS_KB
