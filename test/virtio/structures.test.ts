import { afterEach, expect, it, vi } from 'vitest';
import { readUnchanged } from '../../src/virtio/structures.ts';
import { readStable } from '../../src/virtio/vhost-user-config.ts';

const unstable = expect.objectContaining({ code: 'CONFIG_UNSTABLE' });
afterEach(() => {
  vi.restoreAllMocks();
});

/** Each call takes a second, and gives another number. */
function slowly(): { next(): number; calls: number } {
  let now = performance.now();
  vi.spyOn(performance, 'now').mockImplementation(() => now);
  return {
    calls: 0,
    next() {
      now += 1000;
      return ++this.calls;
    },
  };
}

it('gives up soon on a configuration that always changes and takes long to be read, by generation', () => {
  const device = slowly();
  expect(() =>
    readUnchanged(
      'test',
      () => device.next(),
      () => 0,
    ),
  ).toThrow(unstable);
  expect(device.calls).toBeLessThan(20);
});

it('gives up soon on a configuration that always changes and takes long to be read, by value', () => {
  const device = slowly();
  const source = { size: 28, bytes: () => Uint8Array.of(device.next() & 0xff) };
  expect(() => readStable(source, (config) => config.read8(0), 'test')).toThrow(unstable);
  expect(device.calls).toBeLessThan(20);
});
