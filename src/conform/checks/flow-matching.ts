/** Packets through the flow filter (Virtio 1.4, 5.1.9.6.4). */
import { ResourceType as R } from '../../virtio/admin-wire.ts';
import { Feature } from '../../virtio/features.ts';
import { CommonCfgField as F } from '../../virtio/pci-layout.ts';
import { NetConfigField } from '../../virtio-net/config.ts';
import { FlowFilterAction as Action } from '../../virtio-net/flow-filter-wire.ts';
import type { Bench } from '../bench.ts';
import { type Check, expect, must, need, untried } from '../check.ts';
import type { Driver } from '../driver.ts';
import { isEqual, udpFrame } from '../frames.ts';
import type { Network } from '../network.ts';
import { offeredCapabilities, succeeded } from '../offer.ts';
import { type Classification, classification, portMatch } from '../samples.ts';

import { basis, type Filter, group, needFlow, PORT, ruleCreate } from './flow-filter.ts';

const SECTION = '5.1.9.6.4';
const OTHER_PORT = 4100;

/** The device with a flow filter, and the other side of its link. */
async function filtering(
  bench: Bench,
): Promise<Filter & { driver: Driver; network: Network; classified: Classification }> {
  const { driver, network } = await bench.network({ ipsec: true });
  const admin = bench.console(driver);
  const offer = await offeredCapabilities(admin);
  needFlow(offer);
  need(
    offer.actions.includes(Action.drop) && offer.actions.includes(Action.directRxVq),
    'the device cannot drop or direct packets',
  );
  const classified = await basis({ admin, offer });
  return { driver, network, admin, offer, classified };
}

/** Whether a packet to `port` arrives: another one that no rule concerns comes after it. */
async function arrives(bench: Bench, network: Network, port: number): Promise<boolean> {
  const packet = udpFrame({ ...network.inward, destinationPort: port });
  const marker = udpFrame({ ...network.inward, destinationPort: OTHER_PORT });
  await network.inject(packet);
  await network.inject(marker);
  let came = false;
  for (;;) {
    const received = await network.arrival('a packet that no rule matches');
    if (isEqual(received.frame, packet)) came = true;
    if (isEqual(received.frame, marker)) break;
  }
  // The device may work on the two in parallel.
  if (!came) came = (await network.arrivedAfterAll()) !== null;
  bench.log(`a packet to port ${port} ${came ? 'arrived' : 'did not arrive'}`);
  return came;
}

export const flowMatchingChecks: readonly Check[] = [
  must(
    'FLT-016',
    SECTION,
    'A packet that a rule directs to a queue that is reset is dropped',
    ['flow-reset-queue-steers'],
    async (bench) => {
      bench.needFeatures(Feature.MQ, Feature.CTRL_VQ, Feature.RING_RESET);
      const max = bench.target.structures.device.read16(NetConfigField.maxVirtqueuePairs);
      need(max >= 2, 'the device has one queue pair');
      const second = 2;
      const control = 2 * max;
      const { driver, network } = await bench.network({
        ipsec: true,
        features: [Feature.MQ, Feature.CTRL_VQ, Feature.RING_RESET],
        queues: [second, second + 1, control],
      });
      await usePairs(bench, driver, control, 2);
      driver.fill(second);
      const admin = bench.console(driver);
      const offer = await offeredCapabilities(admin);
      needFlow(offer);
      const filter = { admin, offer };
      const classified = await basis(filter);
      succeeded(await ruleCreate(filter, 0, classified, { queue: second }));
      await network.inject(udpFrame({ ...network.inward, destinationPort: PORT }));
      await network.arrival('a packet that is directed to receiveq2', second);
      bench.log('a packet came in receiveq2');
      const { common } = bench.target.structures;
      common.write16(F.queueSelect, second);
      common.write16(F.queueReset, 1);
      await bench.eventually(() => common.read16(F.queueReset) === 0, 'queue_reset does not return to 0');
      const packet = udpFrame({ ...network.inward, destinationPort: PORT });
      await network.inject(packet);
      const came = await network.arrivedAfterAll();
      expect(came === null || !isEqual(came.frame, packet), 'the packet was passed in another queue');
      bench.log('after its reset, a packet for it was dropped');
    },
  ),
  must(
    'FLT-017',
    SECTION,
    'When a rule was applied, no other rule is, and no other action taken',
    ['flow-drop-first'],
    async (bench) => {
      const { network, classified, ...filter } = await filtering(bench);
      succeeded(await ruleCreate(filter, 0, classified, { priority: 9 }));
      succeeded(await ruleCreate(filter, 1, classified, { priority: 1, action: Action.drop }));
      expect(
        await arrives(bench, network, PORT),
        'a rule of lower priority dropped a packet that another rule had directed',
      );
    },
  ),
  must(
    'FLT-018',
    SECTION,
    'The rules of the group with the highest priority come first, and others are ignored when one matches',
    ['flow-groups-reversed'],
    async (bench) => {
      const { network, classified, ...filter } = await filtering(bench);
      succeeded(await filter.admin.create(R.NET_FF_GROUP, 1, group(20)));
      succeeded(await ruleCreate(filter, 0, classified, { group: 0, priority: 9, action: Action.drop }));
      succeeded(await ruleCreate(filter, 1, classified, { group: 1, priority: 1 }));
      expect(
        await arrives(bench, network, PORT),
        'a rule of the group with priority 10 came before that of the group with 20',
      );
    },
  ),
  must(
    'FLT-019',
    SECTION,
    'When no rule of a group matches, the group with the next priority is tried',
    ['flow-top-group-only'],
    async (bench) => {
      const { network, classified, ...filter } = await filtering(bench);
      const other = classification(filter.offer, portMatch(PORT + 1));
      succeeded(await filter.admin.create(R.NET_FF_GROUP, 1, group(20)));
      succeeded(await ruleCreate(filter, 0, other, { group: 1, action: Action.drop }));
      succeeded(await ruleCreate(filter, 1, classified, { group: 0, action: Action.drop }));
      expect(
        !(await arrives(bench, network, PORT)),
        'the DROP rule of the group with the lower priority was not applied',
      );
    },
  ),
  must(
    'FLT-020',
    SECTION,
    'The rules of a group are applied from the highest to the lowest priority',
    ['flow-rules-reversed'],
    async (bench) => {
      const { network, classified, ...filter } = await filtering(bench);
      succeeded(await ruleCreate(filter, 0, classified, { priority: 1, action: Action.drop }));
      succeeded(await ruleCreate(filter, 1, classified, { priority: 9 }));
      expect(await arrives(bench, network, PORT), 'a rule of priority 1 came before one of priority 9');
      succeeded(await filter.admin.destroy(R.NET_FF_RULE, 1));
      expect(!(await arrives(bench, network, PORT)), 'the DROP rule was not applied when the other one had gone');
    },
  ),
  must('FLT-021', SECTION, 'Rules are applied before receive steering', ['flow-ignored'], async (bench) => {
    const { network, classified, ...filter } = await filtering(bench);
    expect(await arrives(bench, network, PORT), 'a packet that no rule matches did not arrive');
    succeeded(await ruleCreate(filter, 0, classified, { action: Action.drop }));
    expect(!(await arrives(bench, network, PORT)), 'a packet that a DROP rule matches was steered to a queue');
  }),
  must(
    'FLT-022',
    SECTION,
    'A packet that was dropped is not processed further',
    ['flow-rules-reversed'],
    async (bench) => {
      const { network, classified, ...filter } = await filtering(bench);
      succeeded(await ruleCreate(filter, 0, classified, { priority: 9, action: Action.drop }));
      succeeded(await ruleCreate(filter, 1, classified, { priority: 1 }));
      expect(!(await arrives(bench, network, PORT)), 'a packet that a rule had dropped was directed by another one');
    },
  ),
  untried(
    'FLT-023',
    SECTION,
    'MUST',
    'A packet that VIRTIO_NET_CTRL_RX, MAC or VLAN drops does not reach the flow filter',
    'a rule that is applied to a packet that was dropped already shows nowhere',
  ),
  must(
    'FLT-024',
    SECTION,
    'A packet that no rule matches is steered as without a flow filter',
    ['flow-drops-unmatched'],
    async (bench) => {
      const { network, classified, ...filter } = await filtering(bench);
      succeeded(await ruleCreate(filter, 0, classified, { action: Action.drop }));
      const packet = udpFrame({ ...network.inward, destinationPort: OTHER_PORT });
      await network.inject(packet);
      const { frame } = await network.arrival('a packet that no rule matches');
      expect(isEqual(frame, packet), 'another packet arrived');
      bench.log('a packet that no rule matches arrived');
    },
  ),
];

/** `struct virtio_net_ctrl` of VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, and the answer that is no error (5.1.9.5.6). */
const PairsSet = { class: 4, command: 0, ok: 0 } as const;

async function usePairs(bench: Bench, driver: Driver, control: number, pairs: number): Promise<void> {
  const { u8 } = bench.target.memory;
  const at = bench.target.allocate(64);
  u8.set([PairsSet.class, PairsSet.command, pairs, 0, 0xff], at);
  const ring = driver.ring(control);
  ring.offer({ at, length: 4 }, { at: at + 4, length: 1, write: true });
  driver.kick(ring);
  await ring.wait(bench.patience);
  expect(u8[at + 4] === PairsSet.ok, `VQ_PAIRS_SET ${pairs} was answered with ${u8[at + 4]}`);
}
