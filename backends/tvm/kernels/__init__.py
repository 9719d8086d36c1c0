"""TIR functions of the ops that a stock schedule makes slow, with dynamic leading sizes.

Every function carries ``tirx.noalias``: without it the compiler keeps no sum in a register. States are written where
they lie: each is read by one function alone, which writes the new tokens before, or as, it reads.
"""
