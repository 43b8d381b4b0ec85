import { readdirSync } from 'node:fs';
import { afterEach, describe, expect, it, vi } from 'vitest';
import { Feature, type NicOptions } from '../../src/index.ts';
import { UserRegion } from '../../src/vfio/user-region.ts';
import { capture, cleanUp, open, receive, send, spawnDevice, startDevice } from './support.ts';

afterEach(async () => {
  vi.restoreAllMocks();
  await cleanUp();
});

const frames = capture('http-ipv4').slice(0, 30);

/** How often registers are written while frames go to the device and back, ten times. */
async function writesFor(server: 'gives' | 'refuses', decline: NonNullable<NicOptions['decline']>): Promise<number> {
  if (server === 'refuses') vi.spyOn(UserRegion.prototype, 'share').mockReturnValue(null);
  const device = await startDevice();
  const nic = await open(device.addresses[0], { ipsec: 'off', decline });
  const writes = [vi.spyOn(UserRegion.prototype, 'write16'), vi.spyOn(UserRegion.prototype, 'write32')];
  for (let i = 0; i < 10; i++) {
    await send(nic, frames, null);
    expect((await receive(nic, frames.length)).map(({ frame }) => frame)).toEqual(frames);
  }
  const count = writes[0].mock.calls.length + writes[1].mock.calls.length;
  expect(nic.broken).toBeNull();
  return count;
}

describe('notifying the device over vfio-user', () => {
  it.each([
    { decline: [], what: 'with' },
    { decline: [Feature.NOTIFICATION_DATA], what: 'without' },
  ])(
    'takes a message only where the server has no eventfd for the register, $what NOTIFICATION_DATA',
    async ({ decline }) => {
      expect(await writesFor('gives', decline)).toBe(0);
      expect(await writesFor('refuses', decline)).toBeGreaterThan(0);
    },
  );

  it('leaves no descriptor open, and finds out that the device is lost', async () => {
    const before = readdirSync('/proc/self/fd').length;
    for (const end of ['close', 'loss'] as const) {
      const device = await spawnDevice();
      const nic = await open(device.addresses[0]);
      await send(nic, frames, null);
      await receive(nic, frames.length);
      if (end === 'loss') {
        const lost = new Promise((resolve) => nic.onBroken(resolve));
        await device.kill();
        expect(await lost).toEqual(expect.objectContaining({ code: 'DEVICE_GONE' }));
      }
      await nic.close();
      await cleanUp();
    }
    await vi.waitFor(() => expect(readdirSync('/proc/self/fd').length).toBeLessThanOrEqual(before), {
      timeout: 10_000,
    });
  });
});
