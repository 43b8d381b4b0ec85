/** The notification structure (Virtio 1.4, 4.1.4.4.1). */
import { Feature } from '../../virtio/features.ts';
import { CommonCfgField, VirtioCfgType } from '../../virtio/pci-layout.ts';
import type { Bench } from '../bench.ts';
import { type Check, expect, must, need } from '../check.ts';
import { capabilities, expectAligned, expectPresent } from './pci-support.ts';

const NOTIFY = '4.1.4.4.1';

/** `queue_notify_off` of every queue that there is. */
function notifyOffsets(bench: Bench): number[] {
  const { common } = bench.target.structures;
  const offsets: number[] = [];
  for (let index = 0; index < common.read16(CommonCfgField.numQueues); index++) {
    common.write16(CommonCfgField.queueSelect, index);
    if (common.read16(CommonCfgField.queueSize) > 0) offsets.push(common.read16(CommonCfgField.queueNotifyOff));
  }
  return offsets;
}

function expectNotifyRoom(bench: Bench, width: number): void {
  const multiplier = bench.target.structures.notifyMultiplier;
  const [cap] = capabilities(bench, VirtioCfgType.NOTIFY);
  for (const [index, offset] of notifyOffsets(bench).entries()) {
    const end = offset * multiplier + width;
    expect(
      cap.length >= end,
      `queue ${index}: cap.length ${cap.length} is less than ${offset} * ${multiplier} + ${width}`,
    );
  }
}

function withData(bench: Bench): boolean {
  return bench.offered().has(Feature.NOTIFICATION_DATA);
}

function needPlain(bench: Bench): void {
  need(!withData(bench), 'the device offers VIRTIO_F_NOTIFICATION_DATA');
}

function needData(bench: Bench): void {
  need(withData(bench), 'the device does not offer VIRTIO_F_NOTIFICATION_DATA');
}

function isPowerOfTwo(value: number): boolean {
  return value > 0 && (value & (value - 1)) === 0;
}

export const pciNotifyChecks: readonly Check[] = [
  must('PCI-012', NOTIFY, 'There is a notification capability', ['no-notify'], (bench) =>
    expectPresent(bench, VirtioCfgType.NOTIFY, 'notification'),
  ),
  must(
    'PCI-013',
    NOTIFY,
    'Without NOTIFICATION_DATA, the offset of the notification structure is 2-byte aligned',
    ['no-notification-data+notify-misaligned'],
    (bench) => {
      needPlain(bench);
      expectAligned(bench, VirtioCfgType.NOTIFY, 'notification', 2);
    },
  ),
  must(
    'PCI-014',
    NOTIFY,
    'Without NOTIFICATION_DATA, notify_off_multiplier is 0 or an even power of 2',
    ['no-notification-data+notify-multiplier'],
    (bench) => {
      needPlain(bench);
      const multiplier = bench.target.structures.notifyMultiplier;
      bench.log(`notify_off_multiplier ${multiplier}`);
      expect(
        multiplier === 0 || (isPowerOfTwo(multiplier) && multiplier % 2 === 0),
        `notify_off_multiplier is ${multiplier}`,
      );
    },
  ),
  must(
    'PCI-015',
    NOTIFY,
    'Without NOTIFICATION_DATA, the notification structure has at least 2 bytes',
    ['no-notification-data+notify-short'],
    (bench) => {
      needPlain(bench);
      for (const { length } of capabilities(bench, VirtioCfgType.NOTIFY))
        expect(length >= 2, `cap.length is ${length}`);
    },
  ),
  must(
    'PCI-016',
    NOTIFY,
    'Without NOTIFICATION_DATA, cap.length holds queue_notify_off * notify_off_multiplier + 2 of every queue',
    ['no-notification-data+notify-outside-bar'],
    (bench) => {
      needPlain(bench);
      expectNotifyRoom(bench, 2);
    },
  ),
  must(
    'PCI-017',
    NOTIFY,
    'With NOTIFICATION_DATA, notify_off_multiplier is 0 or a power of 2 that is a multiple of 4',
    ['notification-data'],
    (bench) => {
      needData(bench);
      const multiplier = bench.target.structures.notifyMultiplier;
      bench.log(`notify_off_multiplier ${multiplier}`);
      expect(
        multiplier === 0 || (isPowerOfTwo(multiplier) && multiplier % 4 === 0),
        `notify_off_multiplier is ${multiplier}`,
      );
    },
  ),
  must(
    'PCI-018',
    NOTIFY,
    'With NOTIFICATION_DATA, the offset of the notification structure is 4-byte aligned',
    ['notification-data'],
    (bench) => {
      needData(bench);
      expectAligned(bench, VirtioCfgType.NOTIFY, 'notification', 4);
    },
  ),
  must(
    'PCI-019',
    NOTIFY,
    'With NOTIFICATION_DATA, the notification structure has at least 4 bytes',
    ['notification-data'],
    (bench) => {
      needData(bench);
      for (const { length } of capabilities(bench, VirtioCfgType.NOTIFY))
        expect(length >= 4, `cap.length is ${length}`);
    },
  ),
  must(
    'PCI-020',
    NOTIFY,
    'With NOTIFICATION_DATA, cap.length holds queue_notify_off * notify_off_multiplier + 4 of every queue',
    ['notification-data'],
    (bench) => {
      needData(bench);
      expectNotifyRoom(bench, 4);
    },
  ),
];
