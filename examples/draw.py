"""Draws the pictures of `make demo`'s second sheet: two rendered scenes to stylize, three styles.

    python examples/draw.py     # writes examples/contents/*.webp and examples/styles/*.webp

All of it is computed here from a seed, so the pictures belong to this repository and share its licence.
"""

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

HEIGHT, WIDTH = 256, 352
HERE = Path(__file__).parent


# ---- Contents: scenes with depth, light and shadow


def still_life(samples: int = 24) -> Image.Image:
    """Fruit and a bowl on a cloth by a window, by ray tracing: soft shadows and one bounce of mirror."""
    random = np.random.default_rng(1)
    spheres = [  # centre, radius, colour, mirror
        ((-1.25, 0.62, 0.1), 0.62, (0.78, 0.16, 0.10), 0.10),
        ((-0.15, 0.50, -0.55), 0.50, (0.90, 0.62, 0.08), 0.06),
        ((0.55, 0.85, 0.65), 0.85, (0.22, 0.36, 0.50), 0.35),
        ((1.45, 0.42, -0.45), 0.42, (0.35, 0.55, 0.16), 0.08),
        ((0.62, 0.25, -1.05), 0.25, (0.42, 0.12, 0.30), 0.15),
        ((-0.75, 0.22, -0.95), 0.22, (0.85, 0.40, 0.15), 0.06),
    ]

    def hit(origin, ray):
        """Distance and number of the nearest sphere, floor (6) or wall (7)."""
        best, which = np.full(len(ray), np.inf), np.full(len(ray), -1)
        for number, (centre, radius, _, _) in enumerate(spheres):
            to = origin - np.array(centre)
            b = (to * ray).sum(1)
            root = b * b - (to * to).sum(1) + radius * radius
            t = -b - np.sqrt(np.maximum(root, 0))
            found = (root > 0) & (t > 1e-3) & (t < best)
            best, which = np.where(found, t, best), np.where(found, number, which)
        for number, (axis, level) in enumerate(((1, 0.0), (2, 3.0)), start=len(spheres)):
            with np.errstate(divide="ignore", invalid="ignore"):
                t = (level - origin[:, axis]) / ray[:, axis]
            found = (t > 1e-3) & (t < best)
            best, which = np.where(found, t, best), np.where(found, number, which)
        return best, which

    def shade(origin, ray, depth=0):
        t, which = hit(origin, ray)
        point = origin + np.where(np.isfinite(t), t, 0)[:, None] * ray
        colour, normal, mirror = np.zeros((len(ray), 3)), np.zeros((len(ray), 3)), np.zeros(len(ray))
        for number, (centre, radius, paint, shine) in enumerate(spheres):
            on = which == number
            normal[on] = (point[on] - np.array(centre)) / radius
            grain = 1 + 0.12 * np.sin(9 * normal[on, 1:2]) * np.sin(7 * normal[on, 0:1])
            colour[on], mirror[on] = np.array(paint) * grain, shine
        floor, wall = which == len(spheres), which == len(spheres) + 1
        checks = (np.floor(point[floor, 0] * 1.6) + np.floor(point[floor, 2] * 1.6)) % 2
        colour[floor] = np.where(checks[:, None] > 0, (0.82, 0.78, 0.68), (0.50, 0.20, 0.18))
        colour[wall] = np.array((0.44, 0.50, 0.46)) * (1 - 0.10 * (np.floor(point[wall, :1] * 3) % 2))
        normal[floor], normal[wall] = (0, 1, 0), (0, 0, -1)
        light = np.array((-3.2, 4.5, -3.0)) + random.normal(0, 0.45, (len(ray), 3)) - point
        distance = np.linalg.norm(light, axis=1)
        light /= distance[:, None]
        blocked, _ = hit(point + 1e-3 * normal, light)
        lit = np.clip((normal * light).sum(1), 0, 1) * (blocked > distance) * 26 / distance**2
        half = light - ray
        half /= np.linalg.norm(half, axis=1)[:, None]
        gloss = np.clip((half * normal).sum(1), 0, 1) ** 60 * (which < len(spheres)) * (blocked > distance)
        out = colour * (0.22 + 0.9 * lit[:, None]) + 0.7 * gloss[:, None]
        if depth == 0:
            bounced = ray - 2 * (ray * normal).sum(1)[:, None] * normal
            out = out * (1 - mirror[:, None]) + mirror[:, None] * shade(point + 1e-3 * normal, bounced, 1)
        return out

    total = np.zeros((HEIGHT * WIDTH, 3))
    rows, columns = np.mgrid[:HEIGHT, :WIDTH].reshape(2, -1)
    for _ in range(samples):
        y = (HEIGHT / 2 - rows - random.random(len(rows))) / HEIGHT
        x = (columns + random.random(len(rows)) - WIDTH / 2) / HEIGHT
        ray = np.stack([x, y - 0.26, np.full(len(x), 1.25)], 1)
        ray /= np.linalg.norm(ray, axis=1)[:, None]
        total += shade(np.tile((0.1, 2.0, -5.0), (len(ray), 1)), ray)
    return as_image((total / samples).reshape(HEIGHT, WIDTH, 3))


def mountains() -> Image.Image:
    """Ridges in haze above a lake that mirrors them, with firs in front."""
    random = np.random.default_rng(5)
    horizon = 150
    rows = np.linspace(0, 1, horizon)[:, None, None]
    sky = (1 - rows) * np.array((0.16, 0.34, 0.68)) + rows * np.array((0.98, 0.78, 0.58))
    scene = np.repeat(sky, WIDTH, 1)
    y, x = np.mgrid[:horizon, :WIDTH]
    clouds = smooth_noise(random, (horizon, WIDTH), (6, 4)) + 0.5 * smooth_noise(
        random, (horizon, WIDTH), (16, 8)
    )
    cover = np.clip(clouds - 0.55, 0, 0.6)[..., None] * (1 - rows)
    scene = scene * (1 - cover) + cover * np.array((1.0, 0.95, 0.9))
    sun = np.exp(-((x - 250) ** 2 + (y - 112) ** 2) / 500)[..., None]
    scene += sun * np.array((0.5, 0.4, 0.2))
    for layer, (level, swing, colour) in enumerate(
        ((78, 58, (0.50, 0.52, 0.64)), (104, 44, (0.33, 0.38, 0.50)), (126, 30, (0.17, 0.26, 0.28)))
    ):
        ridge = sum(
            np.interp(np.arange(WIDTH), np.linspace(0, WIDTH, 2**k + 2), random.random(2**k + 2)) / 1.9**k
            for k in range(2, 8)
        )
        top = level - swing * (ridge / ridge.max() - 0.45)
        depth = (y - top) / 60
        inside = depth > 0
        rock = smooth_noise(random, (horizon, WIDTH), (48, 24)) - 0.5
        face = np.array(colour) * (1 + 0.5 * rock[..., None]) + 0.10 * np.clip(depth, 0, 1)[..., None]
        if layer == 0:
            snow = inside & (depth < 0.34 + 0.4 * rock)
            face = np.where(snow[..., None], (0.93, 0.94, 0.98), face)
        scene = np.where(inside[..., None], face, scene)
    lake = scene[::-1][: HEIGHT - horizon]
    shift = (2.5 * np.sin(np.arange(len(lake)) ** 1.15)).astype(int)
    lake = np.stack([np.roll(row, by, 0) for row, by in zip(lake, shift, strict=True)])
    ripple = smooth_noise(random, lake.shape[:2], (10, 40))[..., None]
    lake = lake * (0.62 + 0.25 * ripple) + np.array((0.0, 0.03, 0.06))
    scene = as_image(np.concatenate([scene, lake]))
    draw = ImageDraw.Draw(scene)
    for foot, height, column in sorted(
        (random.uniform(215, 268), random.uniform(55, 120), random.uniform(-10, 120)) for _ in range(16)
    ):
        for step in range(7):
            base, top = foot - height * step / 8, foot - height * (step + 2.2) / 8
            half, green = height * 0.17 * (1 - step / 8), int(26 + 6 * step + random.uniform(0, 12))
            points = [(column - half, base), (column + half, base), (column, top)]
            draw.polygon(points, fill=(green // 2, green + 14, green // 2 + 8))
    return scene


# ---- Styles: what a hand leaves, not what a lens sees


def waves() -> Image.Image:
    """Rows of overlapping scales, as on Japanese prints, in indigo on paper."""
    size, scale = 384, 4
    random = np.random.default_rng(2)
    sheet = Image.new("RGB", (size * scale // 2, size * scale // 2), (236, 224, 196))
    draw = ImageDraw.Draw(sheet)
    inks = [(28, 52, 98), (62, 98, 140), (126, 160, 178), (206, 214, 200), (196, 92, 66)]
    radius = 76
    for row in range(-2, sheet.height // (radius // 2) + 3):
        for column in range(-1, sheet.width // (2 * radius) + 2):
            x = column * 2 * radius + (row % 2) * radius + random.normal(0, 2)
            y = row * radius // 2 + radius + random.normal(0, 2)
            ink = inks[4] if random.random() < 0.06 else inks[int(random.integers(0, 3))]
            for ring, part in enumerate((1.0, 0.84, 0.66, 0.50, 0.32, 0.16)):
                r = radius * part
                fill = ink if ring % 2 == 0 else (inks[3] if random.random() < 0.75 else (236, 224, 196))
                draw.ellipse((x - r, y - r, x + r, y + r), fill=fill, outline=(18, 30, 58), width=3)
    return paper(sheet.resize((size, size), Image.Resampling.LANCZOS), random, 7)


def mosaic() -> Image.Image:
    """Tesserae in rings around a sun, each of one colour, with grout between them."""
    size = 384
    random = np.random.default_rng(3)
    seeds = []
    for ring in range(26):
        radius = 6 + 14 * ring
        count = max(5, round(2 * math.pi * radius / 15))
        turn = random.random()
        for step in range(count):
            angle = 2 * math.pi * (step + turn + random.normal(0, 0.05)) / count
            at = radius + random.normal(0, 0.8)
            seeds.append((250 + at * math.cos(angle), 130 + at * math.sin(angle), ring))
    seeds = np.array(seeds)
    bands = [
        (236, 186, 60),
        (222, 120, 44),
        (176, 52, 40),
        (40, 96, 120),
        (32, 64, 92),
        (226, 210, 172),
        (84, 130, 96),
    ]
    order = [0, 0, 1, 1, 2, 5, 3, 4, 3, 6, 3, 4, 5, 2, 1, 6, 3, 4, 4, 3, 6, 5, 1, 2, 4, 3]
    colours = np.array([bands[order[int(ring)]] for _, _, ring in seeds]) + random.normal(
        0, 17, (len(seeds), 3)
    )
    y, x = np.mgrid[:size, :size].reshape(2, -1)
    nearest, second, which = np.full(len(x), 1e9), np.full(len(x), 1e9), np.zeros(len(x), int)
    for number, (px, py, _) in enumerate(seeds):
        distance = (x - px) ** 2 + (y - py) ** 2
        closer = distance < nearest
        second = np.where(closer, nearest, np.minimum(second, distance))
        nearest, which = np.where(closer, distance, nearest), np.where(closer, number, which)
    gap = np.sqrt(second) - np.sqrt(nearest)
    tile = colours[which] * (0.82 + 0.18 * np.clip(gap / 6, 0, 1))[:, None]
    grout = np.clip((gap - 1.0) / 1.4, 0, 1)[:, None]
    flat = tile * grout + (1 - grout) * np.array((74, 66, 58))
    return paper(Image.fromarray(np.clip(flat, 0, 255).astype(np.uint8).reshape(size, size, 3)), random, 5)


def strokes() -> Image.Image:
    """Thick strokes of oil along two whirls, light over dark."""
    size = 384
    random = np.random.default_rng(4)
    sheet = Image.new("RGB", (size, size), (22, 36, 74))
    night = [(24, 44, 96), (38, 74, 140), (70, 118, 176), (130, 168, 196), (22, 60, 84), (52, 96, 110)]
    glow = [(246, 214, 110), (238, 186, 70), (250, 236, 190), (214, 150, 60)]
    whirls = ((120, 130, 1.0, 60), (290, 250, -1.0, 52))
    for layer in range(5200):
        x, y = random.uniform(-10, size + 10, 2)
        vx, vy, bright = 1.0, 0.25 * math.sin(x / 40), 0.0
        for cx, cy, sense, reach in whirls:
            dx, dy = x - cx, y - cy
            near = math.exp(-(dx * dx + dy * dy) / (2 * (1.7 * reach) ** 2)) * 9
            norm = math.hypot(dx, dy) + 1e-6
            vx, vy = vx - sense * near * dy / norm, vy + sense * near * dx / norm
            bright = max(bright, math.exp(-((norm - reach * 0.25) ** 2) / (2 * (0.32 * reach) ** 2)))
        palette = glow if random.random() < 0.85 * bright else night
        colour = np.array(palette[int(random.integers(len(palette)))]) + random.normal(0, 12, 3)
        length, width = random.uniform(9, 20), random.uniform(2.2, 5.0) * (1.3 if layer < 1500 else 0.9)
        angle = math.atan2(vy, vx) + random.normal(0, 0.12)
        draw = ImageDraw.Draw(sheet)
        for lane in np.linspace(-1, 1, 4):
            ox, oy = -math.sin(angle) * lane * width / 2, math.cos(angle) * lane * width / 2
            tint = tuple(int(v) for v in np.clip(colour + 22 * lane * random.uniform(0.4, 1), 0, 255))
            a = (x + ox - math.cos(angle) * length / 2, y + oy - math.sin(angle) * length / 2)
            b = (x + ox + math.cos(angle) * length / 2, y + oy + math.sin(angle) * length / 2)
            draw.line((*a, *b), fill=tint, width=max(1, round(width / 2.4)))
    return paper(sheet, random, 4)


# ---- What they share


def smooth_noise(random: np.random.Generator, shape: tuple[int, int], cells: tuple[int, int]) -> np.ndarray:
    """Random values on a coarse grid (columns, rows), enlarged smoothly."""
    coarse = Image.fromarray(random.random((cells[1], cells[0])).astype(np.float32))
    return np.asarray(coarse.resize((shape[1], shape[0]), Image.Resampling.BICUBIC))


def paper(picture: Image.Image, random: np.random.Generator, strength: float) -> Image.Image:
    """The tooth of paper or canvas."""
    pixels = np.asarray(picture).astype(float)
    grain = random.normal(0, strength, pixels.shape[:2])
    return Image.fromarray(np.clip(pixels + grain[..., None], 0, 255).astype(np.uint8)).filter(
        ImageFilter.GaussianBlur(0.4)
    )


def as_image(linear: np.ndarray) -> Image.Image:
    """Linear light to sRGB, roughly."""
    return Image.fromarray((255 * np.clip(linear, 0, 1) ** (1 / 1.8)).astype(np.uint8))


def main() -> None:
    for folder, pictures in (("contents", (still_life, mountains)), ("styles", (waves, mosaic, strokes))):
        (HERE / folder).mkdir(exist_ok=True)
        for draw in pictures:
            draw().save(HERE / folder / f"{draw.__name__}.webp", quality=90, method=6)


if __name__ == "__main__":
    main()
