/**
 * A conformance suite for virtio network devices with IPsec (Virtio 1.4): a check for each normative statement about
 * the device that a driver can try, and the reason for each that it cannot.
 *
 * `runConformance` drives one function; `vipsec conform` is its command line.
 *
 * ```ts
 * import { CHECKS, openFunction, runConformance } from 'virtio-ipsec/conform'
 *
 * const { checks } = await runConformance({ open: () => openFunction('0000:01:00.0'), checks: CHECKS })
 * for (const { id, level, title, verdict, detail } of checks) {
 *   if (verdict === 'fail') console.log(`${id} (${level}) ${title}\n${detail}`)
 * }
 * ```
 *
 * The function is reset before and after each check, and belongs to nobody else meanwhile. With `openPeer`, a second function at the other end of
 * its link is driven too; without, checks of packets need a link that leads back.
 */
import type { Check } from './check.ts';
import { adminChecks } from './checks/admin.ts';
import { adminQueueChecks } from './checks/admin-queue.ts';
import { capabilityChecks } from './checks/capabilities.ts';
import { controlCountingChecks } from './checks/control-counting.ts';
import { controlReceiveChecks } from './checks/control-receive.ts';
import { controlSteeringChecks } from './checks/control-steering.ts';
import { flowFilterChecks } from './checks/flow-filter.ts';
import { flowMatchingChecks } from './checks/flow-matching.ts';
import { receivedChecks } from './checks/header.ts';
import { sentChecks } from './checks/header-sent.ts';
import { initChecks } from './checks/init.ts';
import { interruptChecks } from './checks/interrupts.ts';
import { ipsecChecks } from './checks/ipsec.ts';
import { ipsecTrafficChecks } from './checks/ipsec-traffic.ts';
import { memberCommandChecks } from './checks/member-commands.ts';
import { netConfigChecks } from './checks/net-config.ts';
import { objectChecks } from './checks/objects.ts';
import { packedQueueChecks } from './checks/packed-queues.ts';
import { pciChecks } from './checks/pci.ts';
import { pciNotifyChecks } from './checks/pci-notify.ts';
import { queueChecks } from './checks/queues.ts';
import { resetChecks } from './checks/reset.ts';
import { suspendChecks } from './checks/suspend.ts';

export { openFunction } from '../nic/device.ts';
export { WIRE_REVISIONS, type WireRevision } from '../virtio/revision.ts';
export {
  AREAS,
  type Area,
  areaOf,
  type Check,
  type CheckResult,
  type Level,
  type Trial,
  type Untried,
  type Verdict,
} from './check.ts';
export type { RingFormat } from './ring.ts';
export { type ConformanceOptions, type ConformanceReport, runConformance } from './runner.ts';

/** All checks, area by area. */
export const CHECKS: readonly Check[] = [
  ...pciChecks,
  ...pciNotifyChecks,
  ...interruptChecks,
  ...initChecks,
  ...netConfigChecks,
  ...resetChecks,
  ...suspendChecks,
  ...queueChecks,
  ...packedQueueChecks,
  ...controlReceiveChecks,
  ...controlSteeringChecks,
  ...controlCountingChecks,
  ...adminChecks,
  ...adminQueueChecks,
  ...memberCommandChecks,
  ...capabilityChecks,
  ...objectChecks,
  ...flowFilterChecks,
  ...flowMatchingChecks,
  ...ipsecChecks,
  ...ipsecTrafficChecks,
  ...sentChecks,
  ...receivedChecks,
];
