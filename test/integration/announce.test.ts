/** Requests of the device to announce the addresses. */
import { afterEach, describe, expect, it } from 'vitest';
import { Feature, type NicOptions, openNic } from '../../src/index.ts';
import { atEnd, cleanUp, open, startDevice, until } from './support.ts';

afterEach(cleanUp);

async function openAt(address: string, options: NicOptions = {}) {
  const nic = await openNic(address, { ipsec: 'off', ...options });
  atEnd(() => nic.close());
  return nic;
}

describe('a device that has moved', () => {
  it.each([
    { name: 'by an interrupt', interrupts: true },
    { name: 'without one, in time', interrupts: false },
  ])('asks, and is told when the application has announced itself: $name', async ({ interrupts }) => {
    const device = await startDevice();
    const nic = await openAt(device.addresses[0], { interrupts });
    let calls = 0;
    let done = 0;
    nic.onAnnounce(async () => {
      calls++;
      await new Promise((resolve) => setTimeout(resolve, 20));
      done++;
    });
    await device.announce();
    await until(
      () => done === 1,
      () => `${calls} calls`,
    );
    // The acknowledgement is a command: one more besides those that ask how many there were.
    let own = 0;
    const others = async () => {
      own += 2;
      const { commands = 0 } = (await nic.control?.deviceStatistics(2))?.control ?? {};
      return commands - own;
    };
    const before = await others();
    await device.announce();
    await until(
      () => done === 2,
      () => `${calls} calls`,
    );
    let now = before;
    for (let tries = 0; tries < 1000 && now === before; tries++) now = await others();
    expect(now).toBe(before + 1);
    expect(calls).toBe(2);
  });

  it('is heard by somebody who listens later, and by nobody who has stopped', async () => {
    const device = await startDevice();
    const nic = await openAt(device.addresses[0]);
    await device.announce();
    let first = 0;
    const stop = nic.onAnnounce(() => void first++);
    await until(
      () => first === 1,
      () => 'nobody was called',
    );
    stop();
    let second = 0;
    nic.onAnnounce(() => void second++);
    await device.announce();
    await until(
      () => second > 0,
      () => 'nobody was called',
    );
    expect(first).toBe(1);
  });
});

it('a request that stays is not followed for ever', async () => {
  const device = await startDevice({ faults: ['announce-sticks'] });
  const nic = await open(device.addresses[0], { ipsec: 'off' });
  let calls = 0;
  nic.onAnnounce(() => void calls++);
  await until(
    () => calls > 0,
    () => 'the device did not ask',
  );
  await new Promise((resolve) => setTimeout(resolve, 300));
  expect(calls).toBeLessThan(5);
});

it('without the feature there is nothing to listen to', async () => {
  const device = await startDevice();
  const nic = await open(device.addresses[0], { ipsec: 'off', decline: [Feature.GUEST_ANNOUNCE] });
  expect(() => nic.onAnnounce(() => {})).toThrow(expect.objectContaining({ code: 'NO_ANNOUNCE' }));
});
