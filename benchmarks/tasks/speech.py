"""Noisy speech made clean: signal-to-noise ratio to the reference that came with GTCRN."""

from __future__ import annotations

import wave
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from shared_data import SHARED

from graphopt.runtime.onnxruntime_engine import OnnxRuntimeEngine
from tasks.base import Outcome, Run, Task, arrays_file, from_arrays, snr_db


@dataclass(frozen=True)
class _Speech(Task):
    def figures(self, outcome: Outcome) -> dict[str, float]:
        return {"dB SNR to the reference": snr_db(*_alike(_read("gtcrn_reference_16k.wav"), outcome["sound"]))}

    def against(self, outcome: Outcome, reference: Outcome) -> dict[str, float]:
        return {"dB SNR to float": snr_db(reference["sound"], outcome["sound"])}


@dataclass(frozen=True)
class SpectrumOfSpeech(_Speech):
    """NSNet2: gains of 161 bands, 100 frames of 20 ms a call, the states of two GRUs carried from call to call."""

    frames = 100

    @property
    def inputs(self) -> tuple[str, ...]:
        return (f"features:1,{self.frames},161", "h0_1:1,1,400", "h0_2:1,1,400")

    def arguments(self, work: Path) -> list[str]:
        """Noisy speech itself from another beginning, and the clean reference with noise of three strengths."""

        def make() -> dict[str, np.ndarray]:
            run = OnnxRuntimeEngine(self.path).run
            calls: list[dict[str, np.ndarray]] = []
            noise = np.random.default_rng(0).standard_normal(len(_read("gtcrn_reference_16k.wav")))
            for strength in (0.003, 0.01, 0.03):
                self._gains(_read("gtcrn_reference_16k.wav") + strength * noise, run, calls)
            self._gains(_read("noisy_16k.wav")[8000:], run, calls)
            return {name: np.stack([call[name] for call in calls]) for name in calls[0]}

        return from_arrays(arrays_file(work, self.name, make), 24)

    def outcome(self, run: Run, work: Path) -> Outcome:
        sound = _read("noisy_16k.wav")
        spectrum, gains = self._gains(sound, run, [])
        return {"sound": _overlapped(np.fft.irfft(spectrum * gains), _window(320), 160)[: len(sound)]}

    def _gains(self, sound: np.ndarray, run: Run, calls: list[dict[str, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
        spectrum = np.fft.rfft(_framed(sound, 320, 160) * _window(320))
        features = np.log10(np.maximum(np.abs(spectrum) ** 2, 1e-12)).astype(np.float32)
        states = {f"h0_{i}": np.zeros((1, 1, 400), np.float32) for i in (1, 2)}
        gains = []
        for start in range(0, len(features), self.frames):
            chunk = features[start : start + self.frames]
            filled = np.concatenate([chunk, np.full((self.frames - len(chunk), 161), -12, np.float32)])
            call = {"features": filled[None], **states}
            calls.append(call)
            outputs = run(call)
            states = {f"h0_{i}": np.asarray(outputs[f"hn_{i}"]) for i in (1, 2)}
            gains.append(np.clip(outputs["gain"][0, : len(chunk)], 0.01, 1))
        return spectrum, np.concatenate(gains)


@dataclass(frozen=True)
class FramesOfSpeech(_Speech):
    """GTCRN: one frame of a 512-point spectrum a call, three caches carried from call to call."""

    def arguments(self, work: Path) -> list[str]:
        def make() -> dict[str, np.ndarray]:
            run = OnnxRuntimeEngine(self.path).run
            calls: list[dict[str, np.ndarray]] = []
            self._enhanced(_read("noisy_16k.wav")[100:], run, calls)
            return {name: np.stack([call[name] for call in calls[::2]]) for name in calls[0]}

        return from_arrays(arrays_file(work, self.name, make), 200)

    def outcome(self, run: Run, work: Path) -> Outcome:
        return {"sound": self._enhanced(_read("noisy_16k.wav"), run, [])}

    def _enhanced(self, sound: np.ndarray, run: Run, calls: list[dict[str, np.ndarray]]) -> np.ndarray:
        padded = np.pad(sound, (256, 512), mode="reflect")
        spectrum = np.fft.rfft(_framed(padded, 512, 256) * _window(512))
        caches = {
            "conv_cache": np.zeros((2, 1, 16, 16, 33), np.float32),
            "tra_cache": np.zeros((2, 3, 1, 1, 16), np.float32),
            "inter_cache": np.zeros((2, 1, 33, 16), np.float32),
        }
        made = []
        for frame in spectrum:
            mix = np.stack([frame.real, frame.imag], axis=-1).astype(np.float32)[None, :, None]
            call = {"mix": mix, **caches}
            calls.append(call)
            outputs = run(call)
            caches = {name: np.asarray(outputs[f"{name}_out"]) for name in caches}
            made.append(outputs["enh"][0, :, 0, 0] + 1j * outputs["enh"][0, :, 0, 1])
        return _overlapped(np.fft.irfft(np.stack(made)), _window(512), 256)[256 : 256 + len(sound)]


def _read(name: str) -> np.ndarray:
    with wave.open(str(SHARED / "audio" / name)) as file:
        return np.frombuffer(file.readframes(file.getnframes()), np.int16).astype(np.float64) / 32768


def _window(length: int) -> np.ndarray:
    """The square root of a periodic Hann window: twice applied, halves of neighbours add up to one."""
    return np.sqrt(0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / length))


def _framed(sound: np.ndarray, length: int, hop: int) -> np.ndarray:
    count = 1 + (len(sound) - length) // hop
    return np.stack([sound[i * hop : i * hop + length] for i in range(count)])


def _overlapped(frames: np.ndarray, window: np.ndarray, hop: int) -> np.ndarray:
    sound = np.zeros(hop * (len(frames) - 1) + len(window))
    for index, frame in enumerate(frames * window):
        sound[index * hop : index * hop + len(window)] += frame
    return sound


def _alike(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    length = min(len(a), len(b))
    return a[:length], b[:length]
