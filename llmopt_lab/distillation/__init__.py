"""Knowledge distillation: a small model learns from a large one's whole distribution.

Sources
    Hinton et al. 2015, https://arxiv.org/abs/1503.02531 (soft targets, T^2)
    Sanh et al. 2019, DistilBERT, https://arxiv.org/abs/1910.01108
    Jiao et al. 2019, TinyBERT, https://arxiv.org/abs/1909.10351
    Kim and Rush 2016, sequence level, https://arxiv.org/abs/1606.07947
    Gu et al. 2023, MiniLLM, https://arxiv.org/abs/2306.08543 (reverse KL)
    Agarwal et al. 2023, GKD, https://arxiv.org/abs/2306.13649 (on policy, JSD)
    Muralidharan et al. 2024, Minitron, https://arxiv.org/abs/2407.14679 (pruning)

Symbols
    paper           here                    meaning
    z_i, v_i        student/teacher_logits  (.., n_vocab)
    T               temperature             divides both logits of the soft part
    p_i, q_i        p, q                    softened teacher, softened student
    alpha           soft_weight             of the soft part; the labels have the rest
    beta            beta                    of the generalised JSD; 0.5 is the usual one
    lambda          on_policy               share of the tokens that the student writes itself
"""

from llmopt_lab.distillation.divergences import forward_kl, jsd, reverse_kl
from llmopt_lab.distillation.reference import as_teacher, distillation_loss, soft_targets
from llmopt_lab.distillation.training import Method, train

__all__ = [
    "Method", "as_teacher", "distillation_loss", "forward_kl", "jsd", "reverse_kl", "soft_targets",
    "train",
]  # fmt: skip
