"""Grouping of rows by expert in plain torch. Shapes as in the package; G is M or T, whichever is gathered from."""

import torch


def route(map_TE: torch.Tensor, num_rows: int, max_per_token: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(source_M, place_TK, offsets_E1). `num_rows` is what the map has."""
    offsets_E1 = torch.nn.functional.pad(map_TE.sum(0).cumsum(0), (1, 0))
    _, source_M = map_TE.T.nonzero(as_tuple=True)
    token_M, expert_M = map_TE.nonzero(as_tuple=True)
    place_TE = offsets_E1[:-1] + map_TE.cumsum(0) - 1
    slot_TE = map_TE.cumsum(1) - 1
    place_TK = torch.full((len(map_TE), max_per_token), -1, dtype=torch.int32, device=map_TE.device)
    place_TK[token_M, slot_TE[token_M, expert_M]] = place_TE[token_M, expert_M].int()
    return source_M.int(), place_TK, offsets_E1.int()


def gather(rows_GH: torch.Tensor, source_M: torch.Tensor) -> torch.Tensor:
    """[M, H]."""
    return rows_GH.index_select(0, source_M)


def gather_sum(rows_MH: torch.Tensor, place_TK: torch.Tensor, weights_M: torch.Tensor | None) -> torch.Tensor:
    """[T, H]."""
    out_TH = torch.zeros((len(place_TK), rows_MH.shape[1]), dtype=torch.float32, device=rows_MH.device)
    for place_T in place_TK.unbind(1) if len(rows_MH) else ():
        at_T = place_T.clamp(min=0)
        factor_T = (place_T >= 0).float() if weights_M is None else weights_M[at_T] * (place_T >= 0)
        out_TH.addcmul_(rows_MH.index_select(0, at_T), factor_T[:, None])
    return out_TH.to(rows_MH.dtype)


def unpermute_gradients(
    grad_TH: torch.Tensor, y_MH: torch.Tensor, weights_M: torch.Tensor, source_M: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the rows and of their weights."""
    grad_MH = grad_TH.index_select(0, source_M).float()
    return (grad_MH * weights_M[:, None]).to(y_MH.dtype), torch.linalg.vecdot(grad_MH, y_MH.float())
