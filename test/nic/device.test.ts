import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, describe, expect, it } from 'vitest';
import { InputError } from '../../src/errors.ts';
import { isPortAddress, openDevice, openFunction, openPort } from '../../src/nic/device.ts';
import { cleanUp, startBackEnd } from '../virtio/vhost-user/fake.ts';

afterEach(cleanUp);

const nowhere = join(tmpdir(), 'nobody-listens-here.sock');

describe('a device address', () => {
  it.each(['', 'eth0', 'vfio-user:', '0000:01:00.8', '1:00.0', '/run/nic.sock'])('is refused: %j', async (address) => {
    expect(() => openFunction(address)).toThrow(InputError);
    await expect(openDevice(address)).rejects.toMatchObject({ code: 'DEVICE_ADDRESS' });
  });

  it.each(['vhost-user:', 'vhost-user:,server=1', 'vfio-user:/x', '/x'])(
    'is not that of a port: %j',
    async (address) => {
      await expect(openPort(address)).rejects.toMatchObject({ code: 'DEVICE_ADDRESS' });
    },
  );

  it('of a port is not that of a PCI function', () => {
    expect(isPortAddress('vhost-user:/x')).toBe(true);
    expect(isPortAddress('vfio-user:/x')).toBe(false);
    expect(() => openFunction('vhost-user:/x')).toThrow('a vhost-user port is not a PCI function');
  });

  it('names what is to be connected to', async () => {
    await expect(openDevice(`vfio-user:${nowhere}`)).rejects.toMatchObject({ code: 'CONNECT_FAILED' });
    await expect(openDevice(`vhost-user:${nowhere}`)).rejects.toMatchObject({ code: 'CONNECT_FAILED' });
    const { path } = await startBackEnd();
    const { fn, openTransport } = await openDevice(`vhost-user:${path}`);
    expect(fn.address).toBe(`vhost-user:${path}`);
    expect(openTransport().deviceType).toBe(1);
    fn.close();
  });

  it.each([
    ['', {}, 'cannot connect'],
    [',server=0', { server: true }, 'cannot connect'],
    [',server=off', {}, 'cannot connect'],
    [',server', {}, 'no back-end connected'],
    [',server=1', {}, 'no back-end connected'],
    [',server=on', {}, 'no back-end connected'],
    ['', { server: true }, 'no back-end connected'],
    // Not an option: part of the path.
    [',server=2', {}, 'cannot connect'],
  ])('with %j behind the path says who connects', async (suffix, options, message) => {
    const opening = openPort(`vhost-user:${nowhere}${suffix}`, { ...options, connectTimeoutMs: 20 });
    await expect(opening).rejects.toThrow(message);
  });
});
