import { expect, it } from 'vitest';
import { AdminQueue } from '../../src/virtio/admin.ts';
import { AdminOpcode, decodeResourceCommand, ResourceType } from '../../src/virtio/admin-wire.ts';
import { Feature, FeatureSet } from '../../src/virtio/features.ts';
import { findObjectOpcodes } from '../../src/virtio/objects.ts';
import { DeviceStatus } from '../../src/virtio/pci-layout.ts';
import type { NaiveSplitDevice } from '../virtqueue/support.ts';
import { FakeDevice, receiveCommands } from './fake-device.ts';

/** A device with one object, that reads the two opcodes as `reading` says. */
function open(reading: 'text' | 'table', object: Uint8Array) {
  const device = new FakeDevice();
  const admin = new AdminQueue(device, device, FeatureSet.of(Feature.VERSION_1, Feature.INDIRECT_DESC));
  device.status = DeviceStatus.DRIVER_OK;
  const stored = object.slice();
  device.onNotify = () => {
    for (const command of receiveCommands(device, device.queues.get(2) as NaiveSplitDevice)) {
      const query = reading === 'text' ? 0xc : 0xb;
      if (command.opcode === query) command.reply(0, 0, stored);
      else {
        stored.set(decodeResourceCommand('virtio-1.4', command.opcode, command.data).object.subarray(0, stored.length));
        command.reply(0);
      }
    }
  };
  return { admin, stored };
}

const object = Uint8Array.of(0, 7, 0, 9);

it.each(['text', 'table'] as const)(
  'a device that follows the %s is recognised without changing the object',
  async (reading) => {
    const { admin, stored } = open(reading, object);
    expect(await findObjectOpcodes(admin, ResourceType.NET_FF_GROUP, 3, object)).toBe(reading);
    expect([...stored]).toEqual([...object]);
    expect(admin.queryOpcode).toBe(reading === 'text' ? AdminOpcode.RESOURCE_OBJ_QUERY : 0xb);
    expect(admin.modifyOpcode).toBe(reading === 'text' ? AdminOpcode.RESOURCE_OBJ_MODIFY : 0xc);
    expect([...(await admin.queryObject(ResourceType.NET_FF_GROUP, 3, 4))]).toEqual([...object]);
    await admin.modifyObject(ResourceType.NET_FF_GROUP, 3, Uint8Array.of(1, 1, 1, 1));
    expect([...stored]).toEqual([1, 1, 1, 1]);
    admin.close();
  },
);

it('the question is not put with an outbound SA, nor with an object that cannot answer it', async () => {
  const { admin } = open('text', object);
  await expect(findObjectOpcodes(admin, ResourceType.NET_IPSEC_OUTB_SA, 3, object)).rejects.toThrow(RangeError);
  await expect(findObjectOpcodes(admin, ResourceType.NET_FF_GROUP, 3, new Uint8Array(4))).rejects.toThrow(RangeError);
  admin.close();
});
