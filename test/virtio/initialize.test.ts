import { describe, expect, it } from 'vitest';
import { VfioError, VirtioError } from '../../src/errors.ts';
import { Feature, FeatureSet } from '../../src/virtio/features.ts';
import { initializeDevice, negotiateFeatures, resetDevice } from '../../src/virtio/initialize.ts';
import { DeviceStatus } from '../../src/virtio/pci-layout.ts';
import { FakeDevice } from './fake-device.ts';

const none = FeatureSet.empty;
const nothing = () => {};

function initialize(device: FakeDevice, options: Partial<Parameters<typeof initializeDevice>[1]> = {}) {
  return initializeDevice(device, { required: none, wanted: none, setup: nothing, resetTimeout: 200, ...options });
}

describe('initialisation', () => {
  it('takes the steps of the standard in their order', async () => {
    const device = new FakeDevice();
    device.offered = FeatureSet.of(Feature.VERSION_1, Feature.MAC, Feature.MTU);
    const features = await initialize(device, {
      required: FeatureSet.of(Feature.MAC),
      wanted: FeatureSet.of(Feature.STATUS),
      setup: (negotiated) => {
        device.log.push('setup');
        expect(negotiated.bits()).toEqual([Feature.MAC, Feature.VERSION_1]);
      },
    });
    expect(device.log).toEqual(['status 0', 'status 1', 'status 3', 'features', 'status 11', 'setup', 'status 15']);
    expect(features.equals(device.accepted)).toBe(true);
    expect(device.status).toBe(15);
  });

  it('waits for the reset to be over, whatever the device did before', async () => {
    const device = new FakeDevice();
    device.status = 0x8f;
    device.resetReads = 5;
    await initialize(device);
    expect(device.status).toBe(15);
  });

  it('gives up on a reset that does not end', async () => {
    const device = new FakeDevice();
    device.status = 7;
    device.resetReads = Number.POSITIVE_INFINITY;
    await expect(resetDevice(device, 30)).rejects.toMatchObject({ code: 'RESET_TIMEOUT' });
    await expect(initialize(device, { resetTimeout: 30 })).rejects.toBeInstanceOf(VirtioError);
  });

  it('fails without VERSION_1, says so, and sets FAILED', async () => {
    const device = new FakeDevice();
    device.offered = FeatureSet.of(Feature.MAC);
    const error = await initialize(device).catch((reason: unknown) => reason);
    expect(error).toMatchObject({ code: 'FEATURES_MISSING', hint: expect.stringContaining('legacy') });
    expect(String(error)).toContain('VIRTIO_F_VERSION_1');
    expect(device.status & DeviceStatus.FAILED).not.toBe(0);
    expect(device.log).not.toContain('features');
  });

  it('names every required feature that is missing', async () => {
    const device = new FakeDevice();
    const required = FeatureSet.of(Feature.IPSEC, Feature.ADMIN_VQ, Feature.STATUS);
    await expect(initialize(device, { required })).rejects.toThrow('VIRTIO_NET_F_STATUS, VIRTIO_NET_F_IPSEC');
  });

  it('fails when the device takes FEATURES_OK back', async () => {
    const device = new FakeDevice();
    device.acceptsFeatures = false;
    await expect(initialize(device)).rejects.toMatchObject({ code: 'FEATURES_REJECTED' });
    expect(device.log).not.toContain('status 15');
  });

  it('sets FAILED when the set-up throws, and passes the error on', async () => {
    const device = new FakeDevice();
    const setup = () => Promise.reject(new VirtioError('QUEUE_SIZE', 'no'));
    await expect(initialize(device, { setup })).rejects.toMatchObject({ code: 'QUEUE_SIZE' });
    expect(device.status & DeviceStatus.FAILED).not.toBe(0);
    expect(device.status & DeviceStatus.DRIVER_OK).toBe(0);
  });

  it('fails when the device asks for a reset at DRIVER_OK', async () => {
    const device = new FakeDevice();
    const write = device.writeStatus.bind(device);
    device.writeStatus = (status) =>
      write(status & DeviceStatus.DRIVER_OK ? status | DeviceStatus.DEVICE_NEEDS_RESET : status);
    await expect(initialize(device)).rejects.toMatchObject({ code: 'DEVICE_NEEDS_RESET' });
  });

  it('ends with DEVICE_GONE when the device is lost in the middle', async () => {
    const device = new FakeDevice();
    const setup = () => {
      device.gone = true;
    };
    const error = await initialize(device, { setup }).catch((reason: unknown) => reason);
    expect(error).toBeInstanceOf(VfioError);
    expect(error).toMatchObject({ code: 'DEVICE_GONE' });
  });
});

describe('negotiation', () => {
  it('leaves out a wanted feature whose requirements are not offered', () => {
    const offered = FeatureSet.of(Feature.VERSION_1, Feature.MQ, Feature.CTRL_VQ, Feature.HOST_TSO4);
    const wanted = FeatureSet.of(Feature.MQ, Feature.CTRL_VQ, Feature.HOST_TSO4, Feature.CSUM);
    expect(negotiateFeatures(offered, none, wanted).bits()).toEqual([Feature.CTRL_VQ, Feature.MQ, Feature.VERSION_1]);
  });

  it('does not take a required feature without what it needs', () => {
    const offered = FeatureSet.of(Feature.VERSION_1, Feature.MQ);
    expect(() => negotiateFeatures(offered, FeatureSet.of(Feature.MQ), none)).toThrow('VIRTIO_NET_F_MQ');
  });

  it('accepts nothing that the driver did not ask for', () => {
    const offered = FeatureSet.fromWords([-1, -1, -1, -1]);
    expect(negotiateFeatures(offered, none, none).bits()).toEqual([Feature.VERSION_1]);
  });
});
