"""Every timm model takes the head: one model of each timm module here, every name in the slow sweep."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from marks import few

from benchmarks.survey import attach

ROOT = Path(__file__).resolve().parents[1]

# the smallest classifier of each module of timm 1.0.31
SMALLEST = """
    beit_base_patch16_224 cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32 cpubone_nano crossvit_tiny_240
    cs3darknet_focus_s csatv2 cspnext_tiny davit_tiny deepseek_vit_412m deit_tiny_distilled_patch16_224 densenet121
    dla46x_c dpn48b edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientvim_m1 efficientvit_b0
    efficientvit_m0 ese_vovnet19b_slim_dw fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny gemma4_vit_167m
    ghostnet_050 gmlp_ti16_224 halonet_h1 hardcorenas_b hgnetv2_b0 hiera_tiny_224 hrnet_w18_small iformer_t
    inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lcnet_035 lcnetv2_small legacy_seresnet18
    legacy_xception levit_128s lowformer_b0 mobilenetv5_base mobilevit_xxs mvitv2_tiny
    naflexvit_base_patch16_parfac_gap nasnetalarge nest_tiny nextvit_small pit_ti_224 pnasnet5large poolformerv2_s12
    pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetx_002 repghostnet_050 repvit_m0_9 res2next50 resnest14d resnetv2_18
    rexnet_100 sam2_hiera_tiny samvit_base_patch16_224 selecsls42 sequencer2d_s shvit_s1 skresnet18 starnet_s050
    swiftformer_xs swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 swinv2_tiny_window16_256 test_byobnet test_coatnet
    test_convnext test_efficientnet test_mambaout test_nfnet test_resnet test_vit test_vit_relpos tiny_vit_5m_224
    tnt_s_legacy_patch16_224 tresnet_m twins_svt_small vgg11 visformer_tiny vit_tiny_patch16_dinov3_qkvb
    vit_tiny_r_s16_p8_224 vitamin_small_224 volo_d1_224 xception41p xcit_nano_12_p8_224
""".split()  # noqa: SIM905  (names read better without quotes)


def test_every_module_has_its_model_here():
    modules = {timm.model_entrypoint(name).__module__ for name in timm.list_models()}
    assert {timm.model_entrypoint(name).__module__ for name in SMALLEST} == modules


@pytest.mark.parametrize('name', few(SMALLEST, SMALLEST[::8]))
def test_the_smallest_of_its_module(name):
    result = attach(name)
    assert result['outcome'] == 'attached', result['detail']


@pytest.mark.slow
def test_every_name():
    process = subprocess.run([sys.executable, '-m', 'benchmarks.survey'], cwd=ROOT, capture_output=True, text=True)
    print(process.stdout)
    assert process.returncode == 0, process.stdout
    attached, refused, failed = map(int, re.search(r'attached (\d+), .* (\d+), failed (\d+)', process.stdout).groups())
    assert (attached + refused, failed) == (len(timm.list_models()), 0)
    assert refused <= 7, 'only encoders that were never classifiers'
